// The relation loss of one (sequence, head): the body of attention_relation_kl.cpp, included by
// each_isa.h. Queries lie along the lanes of scores (keys, kQueries), so no sum crosses a vector.

#include "score_operands.h"

// Scores of n keys, of which the softmaxes are to be taken times a and b -> P - Q in the place of
// the student's. divergence (kQueries,): sum over the keys of Q (log Q - log P), of each query.
inline void errors(int64_t n, float a, float b, float* student, float* teacher,
                   double* divergence) {
  Floats most[kParts], teacher_most[kParts];
  for (int part = 0; part < kParts; ++part) {
    most[part] = load(student + part * kWide);
    teacher_most[part] = load(teacher + part * kWide);
  }
  for (int64_t j = 1; j < n; ++j) {
    TBF_UNROLL
    for (int part = 0; part < kParts; ++part) {
      most[part] = greater(most[part], load(student + j * kQueries + part * kWide));
      teacher_most[part] = greater(teacher_most[part], load(teacher + j * kQueries + part * kWide));
    }
  }
  Floats sum[kParts] = {}, teacher_sum[kParts] = {}, gap[kParts] = {};
  for (int64_t j = 0; j < n; ++j) {
    TBF_UNROLL
    for (int part = 0; part < kParts; ++part) {
      float* const own = student + j * kQueries + part * kWide;
      float* const theirs = teacher + j * kQueries + part * kWide;
      const Floats x = (load(own) - most[part]) * a, y = (load(theirs) - teacher_most[part]) * b;
      const Floats p = exponential(x), q = exponential(y);
      sum[part] += p;
      teacher_sum[part] += q;
      gap[part] += q * (y - x);
      store(own, p);
      store(theirs, q);
    }
  }
  Floats of_p[kParts], of_q[kParts];
  for (int part = 0; part < kParts; ++part) {
    of_p[part] = 1.0f / sum[part];
    of_q[part] = 1.0f / teacher_sum[part];
    for (int lane = 0; lane < kWide; ++lane) {
      const double z = sum[part][lane], teacher_z = teacher_sum[part][lane];
      divergence[part * kWide + lane] =
          double(gap[part][lane]) / teacher_z + std::log(z / teacher_z);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    TBF_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = j * kQueries + part * kWide;
      store(student + at, load(student + at) * of_p[part] - load(teacher + at) * of_q[part]);
    }
  }
}

template <class Number>
double relation_kl_as(const AttentionRelationKl& call, const Pair& at, const RelationWorkspace& w,
                      double weight, float* da, float* db) {
  using Terms = typename TermsOf<Number>::Type;
  const int64_t n = at.length, rows = whole_vectors(n), C = w.student.padded;
  const int64_t S = Terms::lanes(w.student.width), St = Terms::lanes(w.teacher.width);
  const float a = 1.0f / __builtin_sqrtf(float(call.width));
  const float b = 1.0f / __builtin_sqrtf(float(call.teacher_width));
  const Side x = {call.a, call.c, 1.0f, 1.0f}, y = {call.b, call.d, 1.0f, 1.0f};
  gather_columns<Number>(Terms{}, y, at, 0, n, rows, w, w.b_rows, w.y_columns, w.stride);
  std::memset(w.db, 0, size_t((n + kSpare) * C) * sizeof(float));
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = n - first < kQueries ? n - first : kQueries;
    gather_columns<Number>(Terms{}, x, at, first, count, kQueries, w, w.a_rows, w.x_columns,
                           kQueries);
    product<1, Terms>(n, kQueries, w.y_columns, w.stride, w.x_columns, kQueries, S, w.scores,
                      kQueries, false);
    product<1, Terms>(n, kQueries, w.y_columns + S * w.stride, w.stride,
                      w.x_columns + S * kQueries, kQueries, St, w.teacher_scores, kQueries, false);
    double divergence[kQueries];
    errors(n, a, b, w.scores, w.teacher_scores, divergence);
    for (int64_t i = 0; i < count; ++i) total += divergence[i];
    if (!call.gradients) continue;
    // Rows of queries beyond the last token are zero, and so is what they add.
    product<kQueries>(n, C, w.scores, 1, w.a_rows, C, kQueries, w.db, C, true);
    product<1>(count, C, w.scores, kQueries, w.b_rows, C, n, w.da, C, false);
    if (call.itself) {
      float* const own = w.db + first * C;
      for (int64_t i = 0; i < count * C; ++i) own[i] += w.da[i];
    } else {
      scatter<float>(w.da, at, first, count, w.student, float(weight * a), da);
    }
  }
  if (call.gradients) {
    scatter<float>(w.db, at, 0, n, w.student, float(weight * a), call.itself ? da : db);
  }
  return total;
}

// The sum over the queries of a (sequence, head), and its rows of the gradients.
double relation_kl(const AttentionRelationKl& call, const Pair& at, const RelationWorkspace& w,
                   double weight, float* da, float* db) {
  const auto body = call.bf16 ? relation_kl_as<BFloat16> : relation_kl_as<float>;
  return body(call, at, w, weight, da, db);
}
