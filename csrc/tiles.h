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

// c (Rows, Columns vectors) = keep * c + sum over s of a[s * a_step + r * kRow] * b[s * b_step +
// column]. `keep` is a factor, or whether to add at all: c is not read for 0.
template <class Terms, int Rows, int Columns, int kRow>
inline void block_product(const float* a, int64_t a_step, const float* b, int64_t b_step,
                          int64_t steps, float* c, int64_t c_row, float keep) {
  Floats sum[Rows][Columns];
  TBF_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TBF_UNROLL
    for (int n = 0; n < Columns; ++n) {
      sum[r][n] = keep != 0.0f ? load(c + r * c_row + n * kWide) * keep : Floats{};
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Floats x[Columns];
    TBF_UNROLL
    for (int n = 0; n < Columns; ++n) x[n] = load(b + n * kWide);
    TBF_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Floats y = Terms::spread(a + r * kRow);
      TBF_UNROLL
      for (int n = 0; n < Columns; ++n) sum[r][n] = Terms::add(sum[r][n], y, x[n]);
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

template <class Terms, int Rows, int kRow>
inline void rows_product(int64_t rows, int64_t columns, const float* a, int64_t a_step,
                         const float* b, int64_t b_step, int64_t steps, float* c, int64_t c_row,
                         float keep) {
  for (int64_t r = 0; r < rows; r += Rows) {
    int64_t n = 0;
    for (; n + 2 * kWide <= columns; n += 2 * kWide) {
      block_product<Terms, Rows, 2, kRow>(a + r * kRow, a_step, b + n, b_step, steps,
                                          c + r * c_row + n, c_row, keep);
    }
    if (n < columns) {
      block_product<Terms, Rows, 1, kRow>(a + r * kRow, a_step, b + n, b_step, steps,
                                          c + r * c_row + n, c_row, keep);
    }
  }
}

// c (rows, columns) = keep * c + A B; `columns` is a multiple of kWide, A (rows, steps) as
// block_product says.
template <int kRow, class Terms = Single>
__attribute__((noinline)) void product(int64_t rows, int64_t columns, const float* a,
                                       int64_t a_step, const float* b, int64_t b_step,
                                       int64_t steps, float* c, int64_t c_row, float keep) {
  if (rows == 0) return;
  const int64_t blocks = (rows + kTallest - 1) / kTallest, each = (rows + blocks - 1) / blocks;
  const auto chosen = each > kTall     ? rows_product<Terms, kTallest, kRow>
                      : each > kMiddle ? rows_product<Terms, kTall, kRow>
                      : each > kShort  ? rows_product<Terms, kMiddle, kRow>
                                       : rows_product<Terms, kShort, kRow>;
  chosen(rows, columns, a, a_step, b, b_step, steps, c, c_row, keep);
}

// The row of the next head, which a thread takes next as a rule: rows of a head are too far apart
// for a CPU to fetch them ahead by itself. There may be none at that address.
template <int write = 0, class Number>
inline void fetch(const Number* at, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(Number);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(at + d, write, 2);
}

// `count` rows of one head from `first` on, times `factor`, then zeros: out (rows, padded).
template <class Number>
void gather(const Heads& x, const Pair& at, int64_t first, int64_t count, int64_t rows,
            const Sizes& size, float factor, float* out) {
  const Number* in =
      static_cast<const Number*>(x.at) + (at.first + first) * x.row + at.head * x.head;
  const int64_t width = size.width, padded = size.padded, whole = width / kWide * kWide;
  for (int64_t i = 0; i < count; ++i, in += x.row, out += padded) {
    fetch(in + x.head, width);
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

#if TBF_DOTS
// `count` rows of one head from `first` on, then zeros, with neighbouring numbers as pairs: out
// (rows, pairs), a multiple of kWide.
inline void gather_pairs(const Heads& x, const Pair& at, int64_t first, int64_t count, int64_t rows,
                         int64_t width, int64_t pairs, float* out) {
  const BFloat16* in =
      static_cast<const BFloat16*>(x.at) + (at.first + first) * x.row + at.head * x.head;
  for (int64_t i = 0; i < count; ++i, in += x.row, out += pairs) {
    fetch(in + x.head, width);
    for (int64_t d = 0; d < width; d += 2 * kWide) {
      const int64_t left = width - d;
      const __mmask32 live = left < 2 * kWide ? (1u << left) - 1 : ~0u;
      _mm512_storeu_si512(out + d / 2, _mm512_maskz_loadu_epi16(live, in + d));
    }
  }
  std::memset(out, 0, size_t((rows - count) * pairs) * sizeof(float));
}

// The same with neighbouring rows as pairs, the last with zeros if it has none: out (count / 2
// rounded up, padded).
inline void gather_row_pairs(const Heads& x, const Pair& at, int64_t first, int64_t count,
                             const Sizes& size, float* out) {
  const BFloat16* in =
      static_cast<const BFloat16*>(x.at) + (at.first + first) * x.row + at.head * x.head;
  for (int64_t i = 0; i < count; i += 2, in += 2 * x.row, out += size.padded) {
    fetch(in + x.head, size.width);
    fetch(in + x.row + x.head, size.width);
    for (int64_t d = 0; d < size.width; d += kWide) {
      const int64_t left = size.width - d;
      const __mmask16 live = left < kWide ? (1u << left) - 1 : 0xFFFF;
      const __mmask16 second = i + 1 < count ? live : 0;
      const auto low = Halves(_mm256_maskz_loadu_epi16(live, in + d));
      const auto high = Halves(_mm256_maskz_loadu_epi16(second, in + x.row + d));
      store(out + d, Floats(__builtin_convertvector(low, Uints) |
                            __builtin_convertvector(high, Uints) << 16));
    }
  }
}
#endif

// The first `count` rows of in (rows, padded), times `factor` -> those of one head from `first` on,
// contiguous.
template <class Number>
void scatter(const float* in, const Pair& at, int64_t first, int64_t count, const Sizes& size,
             float factor, void* out) {
  const int64_t width = size.width, whole = width / kWide * kWide;
  Number* to = static_cast<Number*>(out) + ((at.first + first) * size.heads + at.head) * width;
  for (int64_t i = 0; i < count; ++i, in += size.padded, to += size.heads * width) {
    fetch<1>(to + width, width);
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
