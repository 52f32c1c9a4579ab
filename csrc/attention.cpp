#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tbf {
namespace {

constexpr int64_t kQueries = 32;  // of a tile: two bands of 16, as dropout is drawn
constexpr int64_t kKeys = 128;    // of a block: 16 KB of scores
constexpr int64_t kDrawn = 32;    // keys whose dropout is drawn at a time
constexpr int64_t kSpare = 16;    // rows beyond a matrix that a product may touch
constexpr int64_t kTurns = 4;     // of a thread, at least, where there are enough pairs
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// A sequence's first token, length and number, and the head.
struct Pair {
  int64_t first, length, sequence, head;
};

struct Sizes {
  int64_t heads, width;
  int64_t padded;  // the width, rounded up to whole vectors of any instruction set
  float keep_scale;
};

// What one thread works in, of fp32 numbers: rows (tokens, padded), columns (padded, tokens).
struct Workspace {
  Sizes size;
  int64_t stride;  // of k_columns and v_columns
  float *k_rows, *v_rows, *k_columns, *v_columns, *dk, *dv;       // of the sequence
  float *q_rows, *do_rows, *q_columns, *do_columns, *out_columns;  // of a tile of queries
  float *scores, *grads;                                           // (kKeys, kQueries)
  uint32_t* words;
};

}  // namespace
}  // namespace tbf

#define TBF_EACH_ISA "attention_pair.h"
#include "each_isa.h"

namespace tbf {
namespace {

// Zeroed arrays that begin a cache line.
class Arrays {
 public:
  float* take(int64_t count) {
    constexpr uintptr_t kLine = 64;
    kept_.emplace_back(size_t(count) + kLine / sizeof(float));
    const uintptr_t at = reinterpret_cast<uintptr_t>(kept_.back().data());
    return kept_.back().data() + (kLine - at % kLine) % kLine / sizeof(float);
  }

 private:
  std::vector<std::vector<float>> kept_;
};

Workspace workspace(const Attention& call, int64_t longest, bool gradient, Arrays& arrays) {
  Workspace w{};
  const int64_t padded = (call.width + 15) / 16 * 16, rows = (longest + 15) / 16 * 16 + kSpare;
  w.size = {call.heads, call.width, padded, 256.0f / float(256 - call.threshold)};
  w.stride = rows;
  w.k_rows = arrays.take(rows * padded + kSpare);
  w.k_columns = arrays.take(rows * padded + kSpare);
  w.q_rows = arrays.take(kQueries * padded);
  w.q_columns = arrays.take(kQueries * padded);
  w.out_columns = arrays.take(kQueries * (padded + kSpare));
  w.scores = arrays.take((kKeys + kSpare) * kQueries);
  w.words = reinterpret_cast<uint32_t*>(arrays.take(kQueries * kDrawn / 2));
  if (gradient) {
    w.v_columns = arrays.take(rows * padded + kSpare);
    w.dk = arrays.take(rows * padded);
    w.dv = arrays.take(rows * padded);
    w.do_rows = arrays.take(kQueries * padded);
    w.do_columns = arrays.take(kQueries * padded);
    w.grads = arrays.take((kKeys + kSpare) * kQueries);
  } else {
    w.v_rows = arrays.take(rows * padded + kSpare);
  }
  return w;
}

// body(pair, key, workspace) for every (sequence, head), on whichever thread is free.
template <class Body>
void each_pair(const Attention& call, bool gradient, int threads, const Body& body) {
  int64_t longest = 0;
  for (int64_t b = 0; b < call.sequences; ++b) {
    longest = std::max<int64_t>(longest, call.cu_seqlens[b + 1] - call.cu_seqlens[b]);
  }
  const int64_t pairs = longest > 0 ? call.sequences * call.heads : 0;
  const Key key = site_key(call.site.seed0, call.site.seed1, call.site.site);
  // Heads of a sequence share cache lines, so one thread takes several; but not too many at a time.
  const int64_t several =
      std::max<int64_t>(1, std::min(call.heads, pairs / (kTurns * std::max(threads, 1))));
  std::atomic<int64_t> next{0};
  run_parts(int(std::min<int64_t>(threads, pairs)), [&](int) {
    Arrays arrays;
    const Workspace w = workspace(call, longest, gradient, arrays);
    for (int64_t from = next.fetch_add(several); from < pairs; from = next.fetch_add(several)) {
      for (int64_t n = from; n < std::min(from + several, pairs); ++n) {
        const int64_t b = n / call.heads, first = call.cu_seqlens[b];
        body(Pair{first, call.cu_seqlens[b + 1] - first, b, n % call.heads}, key, w);
      }
    }
  });
}

}  // namespace

void attention_forward_cpu(const Attention& call, void* out, float* lse, int threads) {
  each_pair(call, false, threads, [&](const Pair& at, const Key& key, const Workspace& w) {
    TBF_WIDEST(forward)(call, at, key, w, out, lse);
  });
}

void attention_backward_cpu(const Attention& call, const Heads& grad, const void* out,
                            const float* lse, void* dq, void* dk, void* dv, int threads) {
  const Heads result{out, call.heads * call.width, call.width};
  each_pair(call, true, threads, [&](const Pair& at, const Key& key, const Workspace& w) {
    TBF_WIDEST(backward)(call, at, key, w, grad, result, lse, dq, dk, dv);
  });
}

void exponential_cpu(const float* x, int64_t count, float* out) {
  TBF_WIDEST(exponentials)(x, count, out);
}

}  // namespace tbf
