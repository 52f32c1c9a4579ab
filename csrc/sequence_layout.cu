// sequence_layout on a GPU: one thread block for a row.
#include "sequence_layout.h"

#include "cuda_team.cuh"
#include "entries.h"

namespace tbf {
namespace {

constexpr int kRowThreads = 128;

struct Seen {
  uint64_t length, first, stop;  // `first` counts from the row's end, so that 0 is none

  TBF_HD Seen operator+(const Seen& other) const {
    return {length + other.length, first > other.first ? first : other.first,
            stop > other.stop ? stop : other.stop};
  }
};

__global__ void __launch_bounds__(kRowThreads)
    extents_kernel(const Padding padding, int64_t* extents) {
  __shared__ uint64_t partial[sizeof(Seen) / sizeof(uint64_t) * kRowThreads / kWarp];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  const int64_t b = blockIdx.x, width = padding.width;
  const Seen seen = team.sum<Seen>(width, [&](int64_t n) -> Seen {
    if (!padding.real[b * width + n]) return {0, 0, 0};
    return {1, uint64_t(width - n), uint64_t(n + 1)};
  });
  if (threadIdx.x != 0) return;
  extents[b] = int64_t(seen.length);
  extents[padding.batch + b] = seen.length ? width - int64_t(seen.first) : 0;
  extents[2 * padding.batch + b] = int64_t(seen.stop);
}

__global__ void __launch_bounds__(kRowThreads)
    layout_kernel(const Padding padding, const PackedRows packed) {
  __shared__ uint64_t partial[kRowThreads / kWarp];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  place_row(team, padding, blockIdx.x, packed);
}

}  // namespace

void sequence_extents_cuda(const Padding& padding, int64_t* extents, void* stream) {
  if (padding.batch == 0) return;
  extents_kernel<<<unsigned(padding.batch), kRowThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      padding, extents);
  check_cuda(cudaGetLastError(), "sequence_layout");
}

void sequence_layout_cuda(const Padding& padding, const PackedRows& packed, void* stream) {
  if (padding.batch == 0) return;
  layout_kernel<<<unsigned(padding.batch), kRowThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      padding, packed);
  check_cuda(cudaGetLastError(), "sequence_layout");
}

}  // namespace tbf
