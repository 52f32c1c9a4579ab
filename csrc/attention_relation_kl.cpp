#include "attention_relation_kl.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tbf {
namespace {

// What one thread works in. Rows (tokens, padded), columns (both widths, tokens): those of the
// student come first, and right behind them those of the teacher. Paired, a width is half as much.
struct RelationWorkspace {
  Sizes student, teacher;
  int64_t stride;  // of y_columns
  float *b_rows, *y_columns, *db;    // of the sequence
  float *a_rows, *x_columns, *da;    // of a tile of queries
  float *scores, *teacher_scores;    // (tokens, kQueries)
  float* r_rows;                     // what becomes columns
};

}  // namespace
}  // namespace tbf

#define TBF_WITH_DOTS
#define TBF_EACH_ISA "attention_relation_kl_pair.h"
#include "each_isa.h"

namespace tbf {
namespace {

RelationWorkspace workspace(const AttentionRelationKl& call, int64_t longest, Arrays& arrays) {
  RelationWorkspace w{};
  const int64_t D = whole_vectors(call.width), Dt = whole_vectors(call.teacher_width);
  const int64_t rows = std::max(whole_vectors(longest), kQueries) + kSpare;
  w.student = {call.heads, call.width, D};
  w.teacher = {call.heads, call.teacher_width, Dt};
  w.stride = rows;
  w.b_rows = arrays.take(rows * D + kSpare);
  w.r_rows = arrays.take(rows * std::max(D, Dt) + kSpare);
  w.y_columns = arrays.take(rows * (D + Dt) + kSpare);
  w.db = arrays.take(rows * D);
  w.a_rows = arrays.take(kQueries * D);
  w.x_columns = arrays.take(kQueries * (D + Dt));
  w.da = arrays.take((kQueries + kSpare) * D);
  w.scores = arrays.take(rows * kQueries);
  w.teacher_scores = arrays.take(rows * kQueries);
  return w;
}

}  // namespace

void attention_relation_kl_cpu(const AttentionRelationKl& call, float* loss, float* da, float* db,
                               int threads) {
  const double weight = 1.0 / std::max(double(call.heads) * double(call.tokens), 1.0);
  std::vector<double> sums(size_t(call.sequences * call.heads));
  each_pair(
      {call.cu_seqlens, call.sequences}, call.heads, threads,
      [&](int64_t longest, Arrays& arrays) { return workspace(call, longest, arrays); },
      [&](const Pair& at, const RelationWorkspace& w) {
        if (at.length == 0) return;  // there is no largest score
        sums[size_t(at.sequence * call.heads + at.head)] =
            TBF_WIDEST(relation_kl)(call, at, w, weight, da, db);
      });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *loss = float(total * weight);
}

}  // namespace tbf
