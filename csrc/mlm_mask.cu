// mlm_mask on a GPU: one thread block for a row, then one that puts its chosen tokens in the list.
#include "cuda_team.cuh"
#include "entries.h"
#include "mlm_mask.h"

namespace tbf {
namespace {

// Bytes of shared memory: the keys, padded for the sort, and three arrays of the row's width.
int64_t keys_of(int64_t width) {
  int64_t size = 4;
  while (size < width) size *= 2;
  return size;
}

int64_t shared_bytes(int64_t width) {
  const int64_t words = (width + 3) / 4 * 4;
  return keys_of(width) * 8 + words * (4 + 4 + 1);
}

__global__ void __launch_bounds__(kMostThreads)
    mask_kernel(const MlmMask call, int64_t keys, int32_t* places, int32_t* labels,
                int32_t* counts) {
  extern __shared__ uint64_t memory[];
  __shared__ uint64_t partial[sizeof(Totals) / sizeof(uint64_t) * kMostThreads / kWarp];
  const int64_t b = blockIdx.x, width = call.width, words = (width + 3) / 4 * 4;
  RowScratch row;
  row.keys = memory;
  row.weights = reinterpret_cast<uint32_t*>(memory + keys);
  row.words = row.weights + words;
  row.chosen = reinterpret_cast<uint8_t*>(row.words + words);
  __shared__ uint64_t answer;
  Block team{partial, answer};
  const int64_t count = mask_row(team, call, b, row, [&](int64_t rank, int64_t i, int64_t id) {
    places[b * width + rank] = int32_t(i);
    labels[b * width + rank] = int32_t(id);
  });
  if (threadIdx.x != 0) return;
  if (count < 0) {
    const int64_t i = -1 - count;
    printf("mlm_mask: input_ids[%lld, %lld] is %lld; expected 0 to %lld, the vocabulary\n",
           (long long)b, (long long)i, (long long)call.ids[b * width + i],
           (long long)call.vocabulary - 1);
    __trap();
  }
  counts[b] = int32_t(count);
}

// Row b's tokens go behind those of all rows before it; the last block fills up the list.
__global__ void __launch_bounds__(kMostThreads)
    list_kernel(int64_t batch, int64_t width, const int32_t* places, const int32_t* labels,
                const int32_t* counts, MaskedRows rows) {
  __shared__ uint64_t partial[kMostThreads / kWarp];
  __shared__ uint64_t answer;
  Block team{partial, answer};
  const int64_t b = blockIdx.x;
  const int64_t start =
      int64_t(team.sum<uint64_t>(b, [&](int64_t i) { return uint64_t(counts[i]); }));
  const int64_t count = b < batch ? counts[b] : 0;
  team.each(count, [&](int64_t j) {
    if (start + j >= rows.capacity) return;
    rows.places[start + j] = b * width + places[b * width + j];
    rows.labels[start + j] = labels[b * width + j];
  });
  if (threadIdx.x == 0) rows.offsets[b] = int32_t(start);
  if (b < batch) return;
  if (threadIdx.x == 0 && start > rows.capacity) {
    printf("mlm_mask: %lld tokens are masked and capacity is %lld\n", (long long)start,
           (long long)rows.capacity);
    __trap();
  }
  team.each(rows.capacity - start, [&](int64_t j) {
    rows.places[start + j] = 0;
    rows.labels[start + j] = -100;
  });
}

int threads_for(int64_t width) {
  return int(std::min<int64_t>(kMostThreads, (width + kWarp - 1) / kWarp * kWarp));
}

}  // namespace

void mlm_mask_cuda(const MlmMask& call, const MaskedRows& rows, int32_t* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int32_t* const labels = scratch + call.batch * call.width;
  int32_t* const counts = labels + call.batch * call.width;
  if (call.batch > 0 && call.width > 0) {
    const int64_t bytes = shared_bytes(call.width);
    check_cuda(cudaFuncSetAttribute(mask_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(bytes)),
               "mlm_mask: shared memory");
    mask_kernel<<<unsigned(call.batch), unsigned(threads_for(call.width)), size_t(bytes), on>>>(
        call, keys_of(call.width), scratch, labels, counts);
    check_cuda(cudaGetLastError(), "mlm_mask");
  } else {
    check_cuda(cudaMemsetAsync(counts, 0, size_t(call.batch) * sizeof(int32_t), on), "mlm_mask");
  }
  list_kernel<<<unsigned(call.batch + 1), kMostThreads, 0, on>>>(
      call.batch, call.width, scratch, labels, counts, rows);
  check_cuda(cudaGetLastError(), "mlm_mask");
}

}  // namespace tbf
