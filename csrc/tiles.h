// Products of tiles in vectors, and the way of one head's rows into them and out. Included once for
// each instruction set (each_isa.h), hence no include guard.

#include "vectors.h"

constexpr int kParts = kQueries / kWide;  // vectors of a row of scores

// Rows of a product that stay in registers. A product of other heights fills up its last block:
// what lies beyond a matrix may be read and written, and means nothing.
#if TBF_LANES == 16
constexpr int kTallest = 13, kTall = 11, kMiddle = 8, kShort = 4;
#else
constexpr int kTallest = 6, kTall = 5, kMiddle = 4, kShort = 2;
#endif
static_assert(kTallest <= kSpare);

// c (Rows, Columns vectors) (+)= sum over s of a[s * a_step + r * kRow] * b[s * b_step + column].
template <int Rows, int Columns, int kRow>
inline void block_product(const float* a, int64_t a_step, const float* b, int64_t b_step,
                          int64_t steps, float* c, int64_t c_row, bool add) {
  Floats sum[Rows][Columns];
  TBF_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TBF_UNROLL
    for (int n = 0; n < Columns; ++n) {
      sum[r][n] = add ? load(c + r * c_row + n * kWide) : Floats{};
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Floats x[Columns];
    TBF_UNROLL
    for (int n = 0; n < Columns; ++n) x[n] = load(b + n * kWide);
    TBF_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Floats y = all(a[r * kRow]);
      TBF_UNROLL
      for (int n = 0; n < Columns; ++n) sum[r][n] += y * x[n];
    }
    a += a_step;
    b += b_step;
  }
  TBF_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TBF_UNROLL
    for (int n = 0; n < Columns; ++n) store(c + r * c_row + n * kWide, sum[r][n]);
  }
}

template <int Rows, int kRow>
inline void rows_product(int64_t rows, int64_t columns, const float* a, int64_t a_step,
                         const float* b, int64_t b_step, int64_t steps, float* c, int64_t c_row,
                         bool add) {
  for (int64_t r = 0; r < rows; r += Rows) {
    int64_t n = 0;
    for (; n + 2 * kWide <= columns; n += 2 * kWide) {
      block_product<Rows, 2, kRow>(a + r * kRow, a_step, b + n, b_step, steps,
                                   c + r * c_row + n, c_row, add);
    }
    if (n < columns) {
      block_product<Rows, 1, kRow>(a + r * kRow, a_step, b + n, b_step, steps,
                                   c + r * c_row + n, c_row, add);
    }
  }
}

// c (rows, columns) (+)= A B; `columns` is a multiple of kWide, A (rows, steps) as block_product
// says.
template <int kRow>
__attribute__((noinline)) void product(int64_t rows, int64_t columns, const float* a,
                                       int64_t a_step, const float* b, int64_t b_step,
                                       int64_t steps, float* c, int64_t c_row, bool add) {
  if (rows == 0) return;
  const int64_t blocks = (rows + kTallest - 1) / kTallest, each = (rows + blocks - 1) / blocks;
  const auto chosen = each > kTall     ? rows_product<kTallest, kRow>
                      : each > kMiddle ? rows_product<kTall, kRow>
                      : each > kShort  ? rows_product<kMiddle, kRow>
                                       : rows_product<kShort, kRow>;
  chosen(rows, columns, a, a_step, b, b_step, steps, c, c_row, add);
}

// `count` rows of one head from `first` on, times `factor`, then zeros: out (rows, padded).
template <class Number>
void gather(const Heads& x, const Pair& at, int64_t first, int64_t count, int64_t rows,
            const Sizes& size, float factor, float* out) {
  const Number* in =
      static_cast<const Number*>(x.at) + (at.first + first) * x.row + at.head * x.head;
  const int64_t width = size.width, padded = size.padded, whole = width / kWide * kWide;
  for (int64_t i = 0; i < count; ++i, in += x.row, out += padded) {
    for (int64_t d = whole; d < padded; d += kWide) store(out + d, Floats{});
    for (int64_t d = 0; d < whole; d += kWide) store(out + d, load(in + d) * factor);
    if (whole == width) continue;
    if (width >= kWide) {  // the last vector overlaps the one before
      store(out + width - kWide, load(in + width - kWide) * factor);
    } else {
      Number edge[kWide] = {};
      std::memcpy(edge, in, size_t(width) * sizeof(Number));
      store(out, load(edge) * factor);
    }
  }
  std::memset(out, 0, size_t((rows - count) * padded) * sizeof(float));
}

// The first `count` rows of in (rows, padded), times `factor` -> those of one head from `first` on,
// contiguous.
template <class Number>
void scatter(const float* in, const Pair& at, int64_t first, int64_t count, const Sizes& size,
             float factor, void* out) {
  const int64_t width = size.width, whole = width / kWide * kWide;
  Number* to = static_cast<Number*>(out) + ((at.first + first) * size.heads + at.head) * width;
  for (int64_t i = 0; i < count; ++i, in += size.padded, to += size.heads * width) {
    for (int64_t d = 0; d < whole; d += kWide) store(to + d, load(in + d) * factor);
    if (whole == width) continue;
    if (width >= kWide) {
      store(to + width - kWide, load(in + width - kWide) * factor);
    } else {
      Number edge[kWide];
      store(edge, load(in) * factor);
      std::memcpy(to, edge, size_t(width) * sizeof(Number));
    }
  }
}
