// block_mask on a GPU: a thread block for each block of pairs, and one for the lists.
#include "block_mask.h"

#include "cuda_team.cuh"
#include "entries.h"

namespace tbf {
namespace {

constexpr int kPairThreads = 64;
constexpr int kPairBlocks = 16;  // of an SM at a time, by registers
constexpr int kPartials = kMostThreads / kWarp;

// Blocks are walked by as many thread blocks as a grid's first axis holds.
__global__ void __launch_bounds__(kPairThreads, kPairBlocks)
    kinds_kernel(const Pattern pattern, uint8_t* kinds) {
  __shared__ uint64_t partial[kPartials];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  const int64_t n = pattern.count();
  for (int64_t at = blockIdx.x; at < pattern.masks * n * n; at += gridDim.x) {
    const Kind kind = kind_of(team, pattern, at / (n * n), at / n % n, at % n);
    if (threadIdx.x == 0) kinds[at] = kind;
  }
}

__global__ void __launch_bounds__(kMostThreads)
    lists_kernel(const Pattern pattern, const PatternLists lists) {
  __shared__ uint64_t partial[kPartials];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  fill_lists(team, pattern, lists, true);
  fill_lists(team, pattern, lists, false);
}

__global__ void __launch_bounds__(kPairThreads, kPairBlocks)
    cells_kernel(const Pattern pattern, const PatternLists lists, uint32_t* cells) {
  __shared__ uint64_t partial[kPartials];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  const int64_t n = pattern.count(), words = pattern.side * pattern.side / kWordBits;
  for (int64_t at = blockIdx.x; at < pattern.masks * n * n; at += gridDim.x) {
    if (lists.kinds[at] != kPartial) continue;
    fill_cells(team, pattern, at / (n * n), at / n % n, at % n, cells + lists.tile_of[at] * words);
  }
}

unsigned blocks_for(const Pattern& pattern) {
  const int64_t n = pattern.count(), most = (int64_t{1} << 31) - 1;
  return unsigned(std::min(pattern.masks * n * n, most));
}

}  // namespace

void block_mask_kinds_cuda(const Pattern& pattern, uint8_t* kinds, void* stream) {
  if (blocks_for(pattern) == 0) return;
  kinds_kernel<<<blocks_for(pattern), kPairThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      pattern, kinds);
  check_cuda(cudaGetLastError(), "block_mask");
}

void block_mask_fill_cuda(const Pattern& pattern, const PatternLists& lists, uint32_t* cells,
                          void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  lists_kernel<<<1, kMostThreads, 0, on>>>(pattern, lists);
  check_cuda(cudaGetLastError(), "block_mask");
  if (blocks_for(pattern) == 0) return;
  cells_kernel<<<blocks_for(pattern), kPairThreads, 0, on>>>(pattern, lists, cells);
  check_cuda(cudaGetLastError(), "block_mask");
}

}  // namespace tbf
