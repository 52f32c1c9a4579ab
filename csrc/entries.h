// What bindings.cpp exports and another file defines, for each device.
//
// A _cpu function runs on at most `threads` threads; a _cuda function is queued on `stream`, a
// cudaStream_t of the current device, and does not wait for it.
#pragma once

#include <cstdint>

namespace tbf {

struct MlmMask;
struct Padding;
struct PackedRows;
struct Pattern;
struct PatternLists;

// Chosen tokens of all rows, in order: flat places b * width + i and the ids that were there.
struct MaskedRows {
  int64_t* places;   // (capacity,) then 0
  int64_t* labels;   // (capacity,) then -100
  int32_t* offsets;  // (batch + 1,) running count
  int64_t capacity;
};

// Returns the number of chosen tokens; throws std::invalid_argument.
int64_t mlm_mask_cpu(const MlmMask& call, const MaskedRows& rows, bool allow_empty, int threads);
// `scratch` holds batch * (2 * width + 1) numbers.
void mlm_mask_cuda(const MlmMask& call, const MaskedRows& rows, int32_t* scratch, void* stream);

// extents (3, batch): real tokens of a row, column of the first, one past that of the last.
void sequence_extents_cpu(const Padding& padding, int64_t* extents, int threads);
void sequence_extents_cuda(const Padding& padding, int64_t* extents, void* stream);
void sequence_layout_cpu(const Padding& padding, const PackedRows& packed, int threads);
void sequence_layout_cuda(const Padding& padding, const PackedRows& packed, void* stream);

// kinds (masks, n, n): whether a block is left out, partial or full.
void block_mask_kinds_cpu(const Pattern& pattern, uint8_t* kinds, int threads);
void block_mask_kinds_cuda(const Pattern& pattern, uint8_t* kinds, void* stream);
void block_mask_fill_cpu(const Pattern& pattern, const PatternLists& lists, uint32_t* cells,
                         int threads);
void block_mask_fill_cuda(const Pattern& pattern, const PatternLists& lists, uint32_t* cells,
                          void* stream);

}  // namespace tbf
