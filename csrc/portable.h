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
