// Which cells dropout keeps, on the CPU: those of reference/philox.py, for tensors of any size.
//
// One Philox call serves 16 cells, a byte each; a cell is kept where its byte is at least
// `threshold`. On a GPU the Triton kernels draw the same bytes themselves.
#pragma once

#include <cstdint>

namespace tbf {

struct DropoutSite {
  uint64_t seed0, seed1;
  uint32_t site;
};

// Attention cells of some sequences and heads: `queries` rows from `first` on, a multiple of 16,
// and of tiles of 32 columns those with these numbers, `keys` columns in all: the last may be cut.
struct AttentionPlace {
  const int64_t* sequences;
  int64_t count;
  int64_t first_head, heads;
  int64_t first, queries;
  const int64_t* tiles;
  int64_t keys;
};

// keep (count, heads, queries, keys): 1 or 0.
void attention_keep_cpu(const DropoutSite& at, const AttentionPlace& place, int threshold,
                        float* keep, int threads);

// cells (rows, columns): the random byte of every hidden cell.
void hidden_cells_cpu(const DropoutSite& at, const int32_t* sequences, const int32_t* positions,
                      int64_t rows, int64_t columns, uint8_t* cells, int threads);

}  // namespace tbf
