#include "cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "heads.h"
#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tbf {
namespace {

constexpr int64_t kBlock = 32;   // rows
constexpr int64_t kRun = 2048;   // numbers: sixteen and more vectors of each of four sums

}  // namespace
}  // namespace tbf

#define TBF_EACH_ISA "cross_entropy_row.h"
#include "each_isa.h"

namespace tbf {

void cross_entropy_cpu(const CrossEntropy& call, float* losses, float* dbias, int threads) {
  const int64_t blocks = (call.rows + kBlock - 1) / kBlock, words = call.words;
  const int64_t padded = (words + kRun - 1) / kRun * kRun;
  const bool sums = call.gradients && dbias != nullptr;
  std::vector<float> of_blocks(sums ? size_t(blocks * padded) : 0);
  parallel_rows(blocks, threads, [&](int64_t from, int64_t to, int) {
    Arrays arrays;
    float* const scratch = arrays.take(padded);
    for (int64_t block = from; block < to; ++block) {
      float* const sum = sums ? of_blocks.data() + block * padded : nullptr;
      const int64_t stop = std::min(call.rows, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < stop; ++i) {
        losses[i] = TBF_WIDEST(cross_entropy_row)(call, i, padded, scratch, sum);
      }
    }
  });
  if (!sums) return;
  parallel_rows((words + kRun - 1) / kRun, threads, [&](int64_t from, int64_t to, int) {
    const int64_t stop = std::min(words, to * kRun);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* const sum = of_blocks.data() + block * padded;
      for (int64_t j = from * kRun; j < stop; ++j) dbias[j] += sum[j];
    }
  });
}

}  // namespace tbf
