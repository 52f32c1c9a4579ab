// Vectors of TBF_LANES fp32 numbers. Included once for each instruction set, inside its namespace
// and under its target (each_isa.h), hence no include guard: a 64-byte vector in a function compiled
// for less would be taken apart before the function is inlined anywhere.

constexpr int kWide = TBF_LANES;
typedef float Floats __attribute__((vector_size(4 * TBF_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * TBF_LANES)));
typedef uint32_t Uints __attribute__((vector_size(4 * TBF_LANES)));
typedef uint64_t Longs __attribute__((vector_size(4 * TBF_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * TBF_LANES)));

template <class Vector, class Number>
inline Vector load_as(const Number* at) {
  Vector x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline Floats load(const float* at) { return load_as<Floats>(at); }

inline Floats load(const BFloat16* at) {
  return Floats(__builtin_convertvector(load_as<Halves>(at), Uints) << 16);
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

// Rounded to the nearest, to even in the middle; NaN stays NaN.
inline void store(BFloat16* at, Floats x) {
  const Uints bits = Uints(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Halves out =
      __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Halves);
  std::memcpy(at, &out, sizeof out);
}

inline Floats all(float x) { return x - Floats{}; }

// How a product adds y, one number for all lanes, times x.
struct Single {
  static constexpr int64_t kOfLane = 1;
  static int64_t lanes(int64_t count) { return count; }
  static Floats spread(const float* at) { return all(*at); }
  static Floats add(Floats sum, Floats y, Floats x) { return sum + y * x; }
};

#if TBF_DOTS
// A lane holds two bf16 numbers, whose products are added one after the other. They are exact, and
// either sum is rounded as fp32, to the nearest, to even in the middle; but a number or a sum below
// the normal range, 1.2e-38, counts as 0.
struct Paired {
  static constexpr int64_t kOfLane = 2;
  static int64_t lanes(int64_t count) { return (count + 1) / 2; }
  static Floats spread(const float* at) {
    uint32_t pair;
    std::memcpy(&pair, at, sizeof pair);
    return Floats(Uints{} + pair);
  }
  static Floats add(Floats sum, Floats y, Floats x) {
    return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(y), __m512bh(x)));
  }
};
#endif

inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }

// e^x to 1.2e-7 of itself for x up to 88; 0 below -86, where fp32 soon ends. NaN stays NaN.
// x = k ln 2 + r, |r| <= ln(2) / 2, and e^r is a polynomial fitted to 3e-9 there.
inline Floats exponential(Floats x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its neighbours are 1 apart
  const Floats shifted = x * kLog2E + kRound, k = shifted - kRound;
  const Floats r = (x - k * kLn2High) - k * kLn2Low;
  Floats y = r * 0.00138145f + 0.00836875f;
  y = y * r + 0.04166839f;
  y = y * r + 0.1666652f;
  y = y * r + 0.49999993f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = Floats(Uints(y) + (Uints(shifted) << 23));  // times 2^k, the last bits of `shifted`
  return x < -86.0f ? Floats{} : x == x ? y : x;  // a NaN's bits would have met the shift
}

// Rows of `low` and `high` are read in turn: log2(kWide) such shuffles of all rows transpose them.
#if TBF_LANES == 16
#define TBF_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define TBF_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif TBF_LANES == 8
#define TBF_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define TBF_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define TBF_LOW 0, 4, 1, 5
#define TBF_HIGH 2, 6, 3, 7
#endif

// in (rows, columns) -> out (columns, rows), both multiples of kWide.
inline void transpose(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out,
                      int64_t out_row) {
  for (int64_t i = 0; i < rows; i += kWide) {
    for (int64_t j = 0; j < columns; j += kWide) {
      Floats x[kWide], y[kWide];
      for (int lane = 0; lane < kWide; ++lane) x[lane] = load(in + (i + lane) * in_row + j);
      TBF_UNROLL
      for (int stage = 1; stage < kWide; stage *= 2) {
        TBF_UNROLL
        for (int lane = 0; lane < kWide / 2; ++lane) {
          const Floats a = x[lane], b = x[lane + kWide / 2];
          y[2 * lane] = TBF_SHUFFLE(Ints, a, b, TBF_LOW);
          y[2 * lane + 1] = TBF_SHUFFLE(Ints, a, b, TBF_HIGH);
        }
        TBF_UNROLL
        for (int lane = 0; lane < kWide; ++lane) x[lane] = y[lane];
      }
      for (int lane = 0; lane < kWide; ++lane) store(out + (j + lane) * out_row + i, x[lane]);
    }
  }
}

#undef TBF_LOW
#undef TBF_HIGH
