// What the sources say to a host compiler and to nvcc alike.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define TBF_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TBF_HD inline __attribute__((always_inline))  // into a caller built for a wider ISA
#else
#define TBF_HD inline
#endif

// Numbers of vectors a and b by place, with `Index` an integer vector as wide. Both know
// __builtin_shufflevector, but GCC only from 12 on.
#ifdef __clang__
#define TBF_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TBF_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// Whether the compiler has heard of AVX-512 BF16: GCC from 10 on.
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10)
#define TBF_KNOWS_DOTS 1
#else
#define TBF_KNOWS_DOTS 0
#endif
