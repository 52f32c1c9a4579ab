// A thread block as the team of a row function: every method is called by all threads, and ends
// with all of them past a barrier.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace tbf {

constexpr int kWarp = 32;
constexpr int kMostThreads = 512;
constexpr unsigned kAll = 0xFFFFFFFFu;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

struct Block {
  uint64_t* partial;  // shared: one number for each warp
  uint64_t& answer;   // shared: of one thread, for all

  __device__ static int64_t lane() { return int64_t(threadIdx.x); }
  __device__ static int64_t lanes() { return int64_t(blockDim.x); }

  template <class F>
  __device__ void each(int64_t n, const F& f) {
    for (int64_t i = lane(); i < n; i += lanes()) f(i);
    __syncthreads();
  }

  template <class Counter, class Use>
  __device__ void draw(int64_t n, Key key, const Counter& counter, const Use& use) {
    each(n, [&](int64_t i) { use(i, philox(counter(i), key)); });
  }

  template <class F>
  __device__ int64_t once(const F& f) {
    if (threadIdx.x == 0) answer = uint64_t(f());
    __syncthreads();
    const int64_t found = int64_t(answer);
    __syncthreads();
    return found;
  }

  template <class T>
  __device__ static T shuffled(const T& own, int distance) {
    static_assert(sizeof(T) % sizeof(uint64_t) == 0, "sums are of 64-bit numbers");
    T other;
    for (size_t w = 0; w < sizeof(T) / sizeof(uint64_t); ++w) {
      reinterpret_cast<uint64_t*>(&other)[w] =
          __shfl_down_sync(kAll, reinterpret_cast<const uint64_t*>(&own)[w], distance);
    }
    return other;
  }

  // Sums of all threads' numbers by a tree, the same in every run. `partial` has room for
  // kMostThreads / kWarp values of T.
  template <class T, class F>
  __device__ T sum(int64_t n, const F& f) {
    T own{};
    for (int64_t i = lane(); i < n; i += lanes()) own = own + f(i);
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      own = own + shuffled(own, distance);
    }
    T* const of_warps = reinterpret_cast<T*>(partial);
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = own;
    __syncthreads();
    T total{};
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total = total + of_warps[warp];
    __syncthreads();
    return total;
  }

  template <class F>
  __device__ int64_t first(int64_t n, const F& f) {
    bool found = false;
    for (int64_t i = lane(); i < n; i += lanes()) found |= f(i);
    if (!__syncthreads_or(found)) return -1;
    return once([&]() -> int64_t {
      int64_t i = 0;
      while (!f(i)) ++i;
      return i;
    });
  }

  template <class F>
  __device__ int64_t nth(int64_t n, int64_t count, const F& flag) {
    if (threadIdx.x == 0) answer = 0;
    __syncthreads();
    scan(n, flag, [&](int64_t i, uint64_t before) {
      if (flag(i) && int64_t(before) == count - 1) answer = uint64_t(i + 1);
    });
    const int64_t found = int64_t(answer);
    __syncthreads();
    return found;
  }

  // Each thread walks a run of neighbours, whose sum it learns first.
  template <class Get, class Put>
  __device__ uint64_t scan(int64_t n, const Get& get, const Put& put) {
    const int64_t run = (n + lanes() - 1) / lanes();
    const int64_t from = min(lane() * run, n), to = min(from + run, n);
    uint64_t own = 0;
    for (int64_t i = from; i < to; ++i) own += get(i);
    uint64_t up_to = own;  // of this warp's threads, this one included
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, up_to, distance);
      if (threadIdx.x % kWarp >= unsigned(distance)) up_to += other;
    }
    if (threadIdx.x % kWarp == kWarp - 1) partial[threadIdx.x / kWarp] = up_to;
    __syncthreads();
    uint64_t before = up_to - own, total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
      if (warp < threadIdx.x / kWarp) before += partial[warp];
      total += partial[warp];
    }
    __syncthreads();
    for (int64_t i = from; i < to; ++i) {
      const uint64_t number = get(i);
      put(i, before);
      before += number;
    }
    __syncthreads();
    return total;
  }

  __device__ int64_t compact(int64_t n, const uint8_t* flags, uint32_t* places) {
    return int64_t(scan(
        n, [&](int64_t i) -> uint64_t { return flags[i]; },
        [&](int64_t i, uint64_t before) {
          if (flags[i]) places[before] = uint32_t(i);
        }));
  }

  // Bitonic; `keys` has room for the next power of two, and no key is all ones.
  __device__ void sort(uint64_t* keys, int64_t n) {
    int64_t size = 1;
    while (size < n) size *= 2;
    each(size - n, [&](int64_t i) { keys[n + i] = ~uint64_t{0}; });
    for (int64_t group = 2; group <= size; group *= 2) {
      for (int64_t distance = group / 2; distance > 0; distance /= 2) {
        each(size / 2, [&](int64_t pair) {
          const int64_t i = 2 * pair - (pair & (distance - 1)), j = i + distance;
          const uint64_t a = keys[i], b = keys[j];
          if ((a > b) == ((i & group) == 0)) {
            keys[i] = b;
            keys[j] = a;
          }
        });
      }
    }
  }

  template <class Use>
  __device__ void in_order(uint64_t* keys, int64_t n, const Use& use) {
    sort(keys, n);
    once([&]() -> int64_t {
      int64_t i = 0;
      while (i < n && use(keys[i])) ++i;
      return i;
    });
  }

  // `scratch` keeps the sizes modulo 2^32 while the keys take their place.
  template <class Key, class Hit>
  __device__ void crossings(int64_t n, uint64_t* sizes, uint32_t* scratch, uint64_t start,
                            const Key& key, const Hit& hit) {
    const int64_t count = int64_t(sum<uint64_t>(n, [&](int64_t i) { return sizes[i] != 0; }));
    uint64_t* const keys = sizes;
    each(n, [&](int64_t i) {
      scratch[i] = uint32_t(sizes[i]);
      keys[i] = sizes[i] ? key(i) : ~uint64_t{0};
    });
    sort(keys, n);
    auto size = [&](int64_t j) -> uint64_t {
      const uint32_t own = scratch[uint32_t(keys[j])];
      return own == 0 ? uint64_t{1} << 32 : own;
    };
    scan(count, size, [&](int64_t j, uint64_t before) {
      before += start;
      hit(int64_t(uint32_t(keys[j])), before >> 32 != (before + size(j)) >> 32);
    });
  }
};

}  // namespace tbf
