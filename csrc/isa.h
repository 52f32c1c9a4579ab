// One body compiled for several instruction sets, and the best that this CPU runs.
//
//   TBF_VARIANTS(f, (int64_t n, float* x), (n, x))   // f_body(n, x), always inlined
//   TBF_BEST(f)(n, x);
//
// Attributes on single functions, not flags of a file: an inline function of the standard library
// that was compiled with wider flags could be the copy that the linker keeps for everybody.
#pragma once

#if defined(__GNUC__) && defined(__x86_64__)

#define TBF_VARIANTS(name, parameters, arguments)                                             \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))) static void              \
      name##_avx512 parameters {                                                              \
    name##_body arguments;                                                                    \
  }                                                                                           \
  __attribute__((target("avx2"))) static void name##_avx2 parameters { name##_body arguments; } \
  static void name##_base parameters { name##_body arguments; }

#define TBF_BEST(name)                    \
  (tbf::widest_isa() >= 2   ? name##_avx512 \
   : tbf::widest_isa() == 1 ? name##_avx2   \
                            : name##_base)

#else

#define TBF_VARIANTS(name, parameters, arguments) \
  static void name##_base parameters { name##_body arguments; }
#define TBF_BEST(name) name##_base

#endif

namespace tbf {

// 3: AVX-512 with BF16, 2: AVX-512 (F, BW, DQ, VL), 1: AVX2 and FMA, 0: what every CPU of this
// architecture has.
int widest_isa();

// At most `isa` from now on; -1: what the CPU has. For tests, which compare them.
void limit_isa(int isa);

const char* isa_name();

}  // namespace tbf
