#include "attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tbf {
namespace {

constexpr int64_t kDrawn = 32;  // keys whose dropout is drawn at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// What one thread works in, of fp32 numbers: rows (tokens, padded), columns (padded, tokens).
struct Workspace {
  Sizes size;
  float keep_scale;
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

Workspace workspace(const Attention& call, int64_t longest, bool gradient, Arrays& arrays) {
  Workspace w{};
  const int64_t padded = whole_vectors(call.width), rows = whole_vectors(longest) + kSpare;
  w.size = {call.heads, call.width, padded};
  w.keep_scale = 256.0f / float(256 - call.threshold);
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

// body(pair, key of the dropout, workspace) for every (sequence, head).
template <class Body>
void each(const Attention& call, bool gradient, int threads, const Body& body) {
  const Key key = site_key(call.site.seed0, call.site.seed1, call.site.site);
  each_pair(
      {call.cu_seqlens, call.sequences}, call.heads, threads,
      [&](int64_t longest, Arrays& arrays) { return workspace(call, longest, gradient, arrays); },
      [&](const Pair& at, const Workspace& w) { body(at, key, w); });
}

}  // namespace

void attention_forward_cpu(const Attention& call, void* out, float* lse, int threads) {
  each(call, false, threads, [&](const Pair& at, const Key& key, const Workspace& w) {
    TBF_WIDEST(forward)(call, at, key, w, out, lse);
  });
}

void attention_backward_cpu(const Attention& call, const Heads& grad, const void* out,
                            const float* lse, void* dq, void* dk, void* dv, int threads) {
  const Heads result{out, call.heads * call.width, call.width};
  each(call, true, threads, [&](const Pair& at, const Key& key, const Workspace& w) {
    TBF_WIDEST(backward)(call, at, key, w, grad, result, lse, dq, dk, dv);
  });
}

void exponential_cpu(const float* x, int64_t count, float* out) {
  TBF_WIDEST(exponentials)(x, count, out);
}

}  // namespace tbf
