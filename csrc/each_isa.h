// The file TBF_EACH_ISA included once for each instruction set, inside a namespace of its own and
// with TBF_LANES fp32 numbers to a vector:
//
//   #define TBF_EACH_ISA "attention_pair.h"
//   #include "each_isa.h"
//   TBF_WIDEST(f)(n, x);  // avx512::f, avx2::f or baseline::f
//
// Where TBF_WITH_DOTS is defined too, once more for AVX-512 with BF16, as avx512_bf16::f, and there
// TBF_DOTS is 1: vectors.h has its products.
//
// What that file needs of others is included before. TBF_VARIANTS of isa.h serves plain loops; code
// on vector types has to be compiled for its instruction set from the start.
#include "isa.h"
#include "portable.h"

#if !TBF_KNOWS_DOTS
#undef TBF_WITH_DOTS
#endif

#if defined(__clang__)
#define TBF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TBF_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__GNUC__) && defined(__x86_64__)

#ifdef TBF_WITH_DOTS
#define TBF_WIDEST(name)                        \
  (tbf::widest_isa() == 3   ? avx512_bf16::name \
   : tbf::widest_isa() == 2 ? avx512::name      \
   : tbf::widest_isa() == 1 ? avx2::name        \
                            : baseline::name)

#if defined(__clang__)
#pragma clang attribute push(                                                           \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#define TBF_LANES 16
#define TBF_DOTS 1
namespace tbf {
namespace {
namespace avx512_bf16 {
#include TBF_EACH_ISA
}
}  // namespace
}  // namespace tbf
#undef TBF_DOTS
#undef TBF_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#define TBF_WIDEST(name)                   \
  (tbf::widest_isa() >= 2   ? avx512::name \
   : tbf::widest_isa() == 1 ? avx2::name   \
                            : baseline::name)

#endif
#define TBF_DOTS 0

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define TBF_LANES 16
namespace tbf {
namespace {
namespace avx512 {
#include TBF_EACH_ISA
}
}  // namespace
}  // namespace tbf
#undef TBF_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define TBF_LANES 8
namespace tbf {
namespace {
namespace avx2 {
#include TBF_EACH_ISA
}
}  // namespace
}  // namespace tbf
#undef TBF_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#define TBF_DOTS 0
#define TBF_WIDEST(name) baseline::name

#endif

#define TBF_LANES 4
namespace tbf {
namespace {
namespace baseline {
#include TBF_EACH_ISA
}
}  // namespace
}  // namespace tbf
#undef TBF_LANES
#undef TBF_DOTS
#undef TBF_EACH_ISA
