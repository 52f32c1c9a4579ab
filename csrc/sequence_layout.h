// Which positions of a padded batch are real tokens, one row at a time, on either device.
#pragma once

#include "portable.h"

namespace tbf {

struct Padding {
  const uint8_t* real;  // (batch, width)
  int64_t batch, width;
};

// Of one row: real tokens, the column of the first, and one past that of the last; 0 if none.
struct Extent {
  int64_t length, first, stop;
};

// Results, (total,) each; `cu_seqlens` (batch + 1,) is known by then.
struct PackedRows {
  const int32_t* cu_seqlens;
  int64_t* rows;       // b * width + n
  int32_t* sequences;  // b
  int32_t* positions;  // rank among the row's real tokens
  int64_t total;       // of each; what a wrong cu_seqlens sends beyond them is dropped
};

template <class Team>
TBF_HD void place_row(Team& team, const Padding& padding, int64_t b, const PackedRows& packed) {
  const int64_t base = b * padding.width, start = packed.cu_seqlens[b];
  team.scan(
      padding.width, [&](int64_t n) -> uint64_t { return padding.real[base + n] != 0; },
      [&](int64_t n, uint64_t rank) {
        const int64_t at = start + int64_t(rank);
        if (!padding.real[base + n] || at < 0 || at >= packed.total) return;
        packed.rows[at] = base + n;
        packed.sequences[at] = int32_t(b);
        packed.positions[at] = int32_t(rank);
      });
}

}  // namespace tbf
