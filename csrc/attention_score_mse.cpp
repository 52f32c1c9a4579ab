#include "attention_score_mse.h"

#include <cstring>
#include <vector>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tbf {
namespace {

constexpr int64_t kChunk = 128;  // tokens at a time of the Gram form
constexpr int64_t kChunkStride = kChunk + kSpare;
static_assert(kQueries <= 16 + kSpare);  // a tile fits the rows of any sequence

// What one thread works in. Rows (tokens, padded), columns (both widths, tokens): those of the
// student come first, and right behind them those of the teacher. Paired, a width is half as much.
struct ScoreWorkspace {
  Sizes student, teacher;
  int64_t stride;  // of y_columns
  // Direct: x of a tile of queries, y of the sequence; r_rows is what becomes columns of either.
  // Gram: y alone, a chunk of either side.
  float *q_rows, *x_columns, *k_rows, *r_rows, *y_columns;
  float *dq, *dk, *error, *scores;
  float* gram[2][3];  // of x and y: by themselves the student (D, D), teacher (Dt, D) and (Dt, Dt)
};

}  // namespace
}  // namespace tbf

#define TBF_WITH_DOTS
#define TBF_EACH_ISA "attention_score_mse_pair.h"
#include "each_isa.h"

namespace tbf {
namespace {

ScoreWorkspace workspace(const AttentionScoreMse& call, int64_t longest, Arrays& arrays) {
  ScoreWorkspace w{};
  const bool direct = call.direct_up_to > 0, gram = longest > call.direct_up_to;
  const int64_t D = whole_vectors(call.width), Dt = whole_vectors(call.teacher_width);
  const int64_t tokens = direct ? std::min(longest, call.direct_up_to) : 0;
  const int64_t rows = std::max(whole_vectors(tokens), gram ? kChunk : 0) + kSpare;
  w.student = {call.heads, call.width, D};
  w.teacher = {call.heads, call.teacher_width, Dt};
  w.stride = rows;
  w.k_rows = arrays.take(rows * D + kSpare);
  w.r_rows = arrays.take(rows * std::max(D, Dt) + kSpare);
  w.y_columns = arrays.take(rows * (D + Dt) + kSpare);
  w.dk = arrays.take(rows * D);
  if (direct) {
    w.q_rows = arrays.take(kQueries * D);
    w.x_columns = arrays.take(kQueries * (D + Dt));
    w.dq = arrays.take((kQueries + kSpare) * (D + kSpare));
    w.error = arrays.take((kKeys + kSpare) * kQueries);
    if (call.student) w.scores = arrays.take((kKeys + kSpare) * kQueries);
  }
  for (auto& side : w.gram) {
    if (!gram) continue;
    side[0] = arrays.take((D + kSpare) * D);
    side[1] = arrays.take((Dt + kSpare) * D);
    if (!call.student) side[2] = arrays.take((Dt + kSpare) * Dt);
  }
  return w;
}

}  // namespace

void attention_score_mse_cpu(const AttentionScoreMse& call, float* loss, void* dq, void* dk,
                             int threads) {
  double pairs = 0.0, total = 0.0;
  for (int64_t b = 0; b < call.sequences; ++b) {
    const double length = call.cu_seqlens[b + 1] - call.cu_seqlens[b];
    pairs += length * length;
  }
  const double weight = 1.0 / std::max(double(call.heads) * pairs, 1.0);
  std::vector<double> sums(size_t(call.sequences * call.heads));
  each_pair(
      {call.cu_seqlens, call.sequences}, call.heads, threads,
      [&](int64_t longest, Arrays& arrays) { return workspace(call, longest, arrays); },
      [&](const Pair& at, const ScoreWorkspace& w) {
        sums[size_t(at.sequence * call.heads + at.head)] =
            TBF_WIDEST(score_mse)(call, at, w, weight, dq, dk);
      });
  for (const double sum : sums) total += sum;
  *loss = float(total * weight);
}

}  // namespace tbf
