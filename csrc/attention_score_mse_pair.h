// The attention loss of one (sequence, head), in either form: the body of attention_score_mse.cpp,
// included by each_isa.h. Queries lie along the lanes of the errors (keys, kQueries).

#include "score_operands.h"

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
  float a, b;      // of the student's and the teacher's scores
  float gradient;  // 2 w
};

// <a, b> of symmetric matrices of which the upper triangle counts, in squares of kWide.
inline double inner_of_upper(const float* a, const float* b, int64_t rows, int64_t columns) {
  double on = 0.0, above = 0.0;  // the diagonal squares, the rest
  for (int64_t i = 0; i < rows; ++i, a += columns, b += columns) {
    const int64_t square = i / kWide * kWide;
    Floats sum{};
    for (int64_t n = square + kWide; n < columns; n += kWide) sum += load(a + n) * load(b + n);
    on += lanes_sum(load(a + square) * load(b + square));
    above += lanes_sum(sum);
  }
  return on + 2.0 * above;
}

// c (width, row) = keep * c + X^T X, its upper triangle in squares of kWide; x (steps, row).
template <class Terms>
void gram_of_upper(int64_t width, const float* x, int64_t row, int64_t steps, float* c, bool keep) {
  static_assert(kWide % kMiddle == 0 && kWide <= 2 * kMiddle);  // no square spills into the next
  for (int64_t i = 0; i < width; i += kWide) {
    product<1, Terms>(width - i < kWide ? width - i : kWide, row - i, x + i, row, x + i, row, steps,
                      c + i * row + i, row, keep);
  }
}

// Fills the lower triangle of c (row, row) from the upper.
inline void mirror(float* c, int64_t row) {
  for (int64_t i = 0; i < row; i += kWide) {
    for (int64_t j = i + kWide; j < row; j += kWide) {
      transpose(c + i * row + j, row, kWide, kWide, c + j * row + i, row);
    }
  }
}

// Returns |E|^2, or its part that depends on the student.
template <class Number>
double direct(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
              const Factors& factors, void* dq, void* dk) {
  using Terms = typename TermsOf<Number>::Type;
  constexpr bool kPaired = Terms::kOfLane == 2;
  const int64_t n = at.length, rows = whole_vectors(n), C = w.student.padded;
  const int64_t D = w.student.width, S = Terms::lanes(D), St = Terms::lanes(w.teacher.width);
  const Side x = {call.q, call.p, factors.a, -factors.b}, y = {call.k, call.r, 1.0f, 1.0f};
  // Of pairs, error = E / unit = (a / -b) Q K^T + P R^T, and rows of the student have no factor.
  const float ratio = -factors.a / factors.b, unit = kPaired ? -factors.b : 1.0f;
  gather_columns<Number>(Terms{}, y, at, 0, n, rows, w, w.k_rows, w.y_columns, w.stride);
  std::memset(w.dk, 0, size_t((n + kSpare) * C) * sizeof(float));
  // As rows, dQ needs no transposition; but of narrow heads the last vector may be half empty.
  const bool dq_as_rows = C - D < kWide / 4;
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = n - first < kQueries ? n - first : kQueries;
    gather_columns<Number>(Terms{}, x, at, first, count, kQueries, w, w.q_rows, w.x_columns,
                           kQueries);
    for (int64_t block = 0; block < n; block += kKeys) {
      const int64_t some = n - block < kKeys ? n - block : kKeys;
      const float* const keys = w.y_columns + block;
      const float *const teacher_keys = keys + S * w.stride, *const p = w.x_columns + S * kQueries;
      if (kPaired) {
        product<1, Terms>(some, kQueries, keys, w.stride, w.x_columns, kQueries, S, w.error,
                          kQueries, false);
        product<1, Terms>(some, kQueries, teacher_keys, w.stride, p, kQueries, St, w.error,
                          kQueries, ratio);
      } else {
        product<1>(some, kQueries, keys, w.stride, w.x_columns, kQueries, S + St, w.error, kQueries,
                   false);
      }
      total += squares(w.error, some);
      if (call.student) {
        product<1, Terms>(some, kQueries, teacher_keys, w.stride, p, kQueries, St, w.scores,
                          kQueries, false);
        total -= squares(w.scores, some);
      }
      if (!call.gradients) continue;
      std::memset(w.error + some * kQueries, 0, kSpare * kQueries * sizeof(float));
      product<kQueries>(some, C, w.error, 1, w.q_rows, C, kQueries, w.dk + block * C, C, true);
      if (dq_as_rows) {
        product<1>(count, C, w.error, kQueries, w.k_rows + block * C, C, some, w.dq, C, block > 0);
      } else {
        product<1>(D, kQueries, w.k_rows + block * C, C, w.error, kQueries, some, w.dq, kQueries,
                   block > 0);
      }
    }
    if (!call.gradients) continue;
    if (!dq_as_rows) transpose(w.dq, kQueries, C, kQueries, w.q_rows, C);
    scatter<Number>(dq_as_rows ? w.dq : w.q_rows, at, first, count, w.student,
                    factors.gradient * factors.a * unit, dq);
  }
  if (call.gradients) {
    scatter<Number>(w.dk, at, 0, n, w.student,
                    kPaired ? factors.gradient * factors.a * unit : factors.gradient, dk);
  }
  return total * unit * unit;
}

// A chunk of a side as rows (tokens, padded), or as pairs of rows. Returns how many.
template <class Number>
int64_t gather_chunk(Single, const Side& side, const Pair& at, int64_t first, int64_t count,
                     const ScoreWorkspace& w) {
  gather<Number>(side.student, at, first, count, kChunk, w.student, side.a, w.k_rows);
  gather<Number>(side.teacher, at, first, count, kChunk, w.teacher, side.b, w.r_rows);
  return count;
}

#if TBF_DOTS
template <class Number>
int64_t gather_chunk(Paired, const Side& side, const Pair& at, int64_t first, int64_t count,
                     const ScoreWorkspace& w) {
  gather_row_pairs(side.student, at, first, count, w.student, w.k_rows);
  gather_row_pairs(side.teacher, at, first, count, w.teacher, w.r_rows);
  return Paired::lanes(count);
}
#endif

inline void scale(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

template <class Number>
double gram(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
            const Factors& factors, void* dq, void* dk) {
  using Terms = typename TermsOf<Number>::Type;
  const int64_t n = at.length, D = w.student.width, C = w.student.padded, Dt = w.teacher.width,
                Ct = w.teacher.padded;
  const Side sides[2] = {{call.q, call.p, factors.a, -factors.b}, {call.k, call.r, 1.0f, 1.0f}};
  for (int side = 0; side < 2; ++side) {
    float* const* const own = w.gram[side];
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      const int64_t steps = gather_chunk<Number>(Terms{}, sides[side], at, first, count, w);
      gram_of_upper<Terms>(D, w.k_rows, C, steps, own[0], first > 0);
      product<1, Terms>(Dt, C, w.r_rows, Ct, w.k_rows, C, steps, own[1], C, first > 0);
      if (!call.student) {
        gram_of_upper<Terms>(Dt, w.r_rows, Ct, steps, own[2], first > 0);
      }
    }
    mirror(own[0], C);
    if (Terms::kOfLane == 1) continue;
    const float of_student = sides[side].a, of_teacher = sides[side].b;
    scale(own[0], D * C, of_student * of_student);
    scale(own[1], Dt * C, of_student * of_teacher);
    if (!call.student) scale(own[2], Dt * Ct, of_teacher * of_teacher);
  }
  const auto &x = w.gram[0], &y = w.gram[1];
  double total = inner(x[0], y[0], D, C) + 2.0 * inner(x[1], y[1], Dt, C);
  if (!call.student) {
    total += inner_of_upper(x[2], y[2], Dt, Ct);
    total = total < 0.0 ? 0.0 : total;  // a difference of large numbers; NaN stays NaN
  }
  if (!call.gradients) return total;
  for (int side = 0; side < 2; ++side) {
    float* const* const other = w.gram[1 - side];
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      gather_chunk<Number>(Single{}, sides[side], at, first, count, w);
      transpose(w.k_rows, C, kChunk, C, w.y_columns, kChunkStride);
      product<1>(count, C, w.y_columns, kChunkStride, other[0], C, D, w.dk, C, false);
      transpose(w.r_rows, Ct, kChunk, Ct, w.y_columns, kChunkStride);
      product<1>(count, C, w.y_columns, kChunkStride, other[1], C, Dt, w.dk, C, true);
      scatter<Number>(w.dk, at, first, count, w.student,
                      side == 0 ? factors.gradient * factors.a : factors.gradient,
                      side == 0 ? dq : dk);
    }
  }
  return total;
}

// The sum over the pairs of a (sequence, head), and its rows of the gradients.
double score_mse(const AttentionScoreMse& call, const Pair& at, const ScoreWorkspace& w,
                 double weight, void* dq, void* dk) {
  const float a = 1.0f / __builtin_sqrtf(float(call.width));
  const float b = 1.0f / __builtin_sqrtf(float(call.teacher_width));
  const Factors factors{a, b, float(2.0 * weight)};
  const bool tiles = at.length <= call.direct_up_to;
  const auto body = call.bf16 ? (tiles ? direct<BFloat16> : gram<BFloat16>)
                              : (tiles ? direct<float> : gram<float>);
  return body(call, at, w, factors, dq, dk);
}
