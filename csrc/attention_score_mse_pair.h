// The attention loss of one (sequence, head), in either form: the body of attention_score_mse.cpp,
// included by each_isa.h. Queries lie along the lanes of the errors (keys, kQueries).

#include "tiles.h"

inline double lanes_sum(Floats x) {
  double sum = 0.0;
  for (int lane = 0; lane < kWide; ++lane) sum += double(x[lane]);
  return sum;
}

// Of `rows` rows of kQueries numbers.
inline double squares(const float* x, int64_t rows) {
  Floats sum[kParts] = {};
  for (int64_t i = 0; i < rows; ++i) {
    TBF_UNROLL
    for (int n = 0; n < kParts; ++n) {
      const Floats own = load(x + i * kQueries + n * kWide);
      sum[n] += own * own;
    }
  }
  double total = 0.0;
  for (int n = 0; n < kParts; ++n) total += lanes_sum(sum[n]);
  return total;
}

// <a, b> of (rows, columns) numbers; `columns` is a multiple of kWide.
inline double inner(const float* a, const float* b, int64_t rows, int64_t columns) {
  double total = 0.0;
  for (int64_t i = 0; i < rows; ++i, a += columns, b += columns) {
    Floats sum{};
    for (int64_t n = 0; n < columns; n += kWide) sum += load(a + n) * load(b + n);
    total += lanes_sum(sum);
  }
  return total;
}

struct Factors {
  float a, b;          // of the student's and the teacher's scores
  float dq, dk;        // of the gradients
};

// Returns |E|^2, or its part that depends on the student.
template <class Number>
double direct(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
              const Factors& factors, float* dq, float* dk) {
  const int64_t n = at.length, rows = (n + 15) / 16 * 16, D = w.student.width, C = w.student.padded,
                Dt = w.teacher.width, Ct = w.teacher.padded;
  // Zeros that fill up the student's last vector are overwritten by the teacher's numbers.
  gather<Number>(call.k, at, 0, n, rows, w.student, 1.0f, w.k_rows);
  transpose(w.k_rows, C, rows, C, w.y_columns, w.stride);
  gather<Number>(call.r, at, 0, n, rows, w.teacher, 1.0f, w.r_rows);
  transpose(w.r_rows, Ct, rows, Ct, w.y_columns + D * w.stride, w.stride);
  std::memset(w.dk, 0, size_t((n + kSpare) * C) * sizeof(float));
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = n - first < kQueries ? n - first : kQueries;
    gather<Number>(call.q, at, first, count, kQueries, w.student, factors.a, w.q_rows);
    transpose(w.q_rows, C, kQueries, C, w.x_columns, kQueries);
    gather<Number>(call.p, at, first, count, kQueries, w.teacher, -factors.b, w.p_rows);
    transpose(w.p_rows, Ct, kQueries, Ct, w.x_columns + D * kQueries, kQueries);
    for (int64_t block = 0; block < n; block += kKeys) {
      const int64_t some = n - block < kKeys ? n - block : kKeys;
      product<1>(some, kQueries, w.y_columns + block, w.stride, w.x_columns, kQueries, D + Dt,
                 w.error, kQueries, false);
      total += squares(w.error, some);
      if (call.student) {
        product<1>(some, kQueries, w.y_columns + D * w.stride + block, w.stride,
                   w.x_columns + D * kQueries, kQueries, Dt, w.scores, kQueries, false);
        total -= squares(w.scores, some);
      }
      std::memset(w.error + some * kQueries, 0, kSpare * kQueries * sizeof(float));
      product<kQueries>(some, C, w.error, 1, w.q_rows, C, kQueries, w.dk + block * C, C, true);
      product<1>(D, kQueries, w.k_rows + block * C, C, w.error, kQueries, some, w.dq_columns,
                 kQueries, block > 0);
    }
    transpose(w.dq_columns, kQueries, C, kQueries, w.q_rows, C);
    scatter<float>(w.q_rows, at, first, count, w.student, factors.dq, dq);
  }
  scatter<float>(w.dk, at, 0, n, w.student, factors.dk, dk);
  return total;
}

// One side of the Gram form: X of queries or Y of keys, student and teacher, each with its factor.
struct Side {
  Heads student, teacher;
  float a, b;
};

// A chunk of a side as rows.
template <class Number>
void gather_chunk(const Side& side, const Pair& at, int64_t first, int64_t count,
                  const ScoreWorkspace& w) {
  gather<Number>(side.student, at, first, count, kChunk, w.student, side.a, w.k_rows);
  gather<Number>(side.teacher, at, first, count, kChunk, w.teacher, side.b, w.r_rows);
}

template <class Number>
double gram(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
            const Factors& factors, float* dq, float* dk) {
  const int64_t n = at.length, D = w.student.width, C = w.student.padded, Dt = w.teacher.width,
                Ct = w.teacher.padded;
  const Side sides[2] = {{call.q, call.p, factors.a, -factors.b}, {call.k, call.r, 1.0f, 1.0f}};
  for (int side = 0; side < 2; ++side) {
    float* const* const own = w.gram[side];
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      gather_chunk<Number>(sides[side], at, first, count, w);
      product<1>(D, C, w.k_rows, C, w.k_rows, C, count, own[0], C, first > 0);
      product<1>(Dt, C, w.r_rows, Ct, w.k_rows, C, count, own[1], C, first > 0);
      if (!call.student) {
        product<1>(Dt, Ct, w.r_rows, Ct, w.r_rows, Ct, count, own[2], Ct, first > 0);
      }
    }
  }
  const auto &x = w.gram[0], &y = w.gram[1];
  double total = inner(x[0], y[0], D, C) + 2.0 * inner(x[1], y[1], Dt, C);
  if (!call.student) {
    total += inner(x[2], y[2], Dt, Ct);
    total = total < 0.0 ? 0.0 : total;  // a difference of large numbers; NaN stays NaN
  }
  for (int side = 0; side < 2; ++side) {
    float* const* const other = w.gram[1 - side];
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      gather_chunk<Number>(sides[side], at, first, count, w);
      transpose(w.k_rows, C, kChunk, C, w.y_columns, kChunkStride);
      product<1>(count, C, w.y_columns, kChunkStride, other[0], C, D, w.dk, C, false);
      transpose(w.r_rows, Ct, kChunk, Ct, w.y_columns, kChunkStride);
      product<1>(count, C, w.y_columns, kChunkStride, other[1], C, Dt, w.dk, C, true);
      scatter<float>(w.dk, at, first, count, w.student, side == 0 ? factors.dq : factors.dk,
                     side == 0 ? dq : dk);
    }
  }
  return total;
}

// The sum over the pairs of a (sequence, head), and its rows of the gradients.
double score_mse(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
                 double weight, float* dq, float* dk) {
  const float a = 1.0f / __builtin_sqrtf(float(call.width));
  const float b = 1.0f / __builtin_sqrtf(float(call.teacher_width));
  const Factors factors{a, b, float(2.0 * weight) * a, float(2.0 * weight)};
  const bool tiles = at.length <= call.direct_up_to;
  const auto body = call.bf16 ? (tiles ? direct<BFloat16> : gram<BFloat16>)
                              : (tiles ? direct<float> : gram<float>);
  return body(call, at, w, factors, dq, dk);
}
