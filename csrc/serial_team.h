// The methods that a row function asks of its team, for one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "philox.h"

namespace tbf {

// One thread as the team of a row function; cuda_team.cuh has the same methods for many.
struct Serial {
  static constexpr int kLane = 8;  // keys of a vector

  uint64_t* spare = nullptr;  // the sort's other array: that of the keys, and kLane more
  uint32_t* buckets = nullptr;  // of sort_spread: at least twice as many as keys, and 1 more

  template <class T, class F>
  TBF_HD T sum(int64_t n, const F& f) {
    T total{};
    for (int64_t i = 0; i < n; ++i) total = total + f(i);
    return total;
  }

  template <class F>
  TBF_HD void each(int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  template <class F>
  TBF_HD int64_t first(int64_t n, const F& f) {
    uint64_t any = 0;
    for (int64_t i = 0; i < n; ++i) any |= uint64_t(f(i));
    if (!any) return -1;
    int64_t i = 0;
    while (!f(i)) ++i;
    return i;
  }

  // One past the `count`-th i for which flag(i) is 1, or 0 if count is.
  template <class F>
  TBF_HD int64_t nth(int64_t, int64_t count, const F& flag) {
    int64_t i = 0;
    while (count > 0) count -= int64_t(flag(i++));
    return i;
  }

  template <class F>
  TBF_HD int64_t once(const F& f) {
    return f();
  }

  // use(i, Philox of counter(i)) for all i.
  template <class Counter, class Use>
  TBF_HD void draw(int64_t n, Key key, const Counter& counter, const Use& use) {
    for (int64_t first = 0; first < n; first += kLanes) {
      const int live = int(std::min<int64_t>(kLanes, n - first));
      Lanes lanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes.put(lane, counter(first + std::min(lane, live - 1)));
      }
      lanes.philox(key);
      for (int lane = 0; lane < live; ++lane) use(first + lane, lanes.at(lane));
    }
  }

  // put(i, sum of get(0..i-1)); returns the sum of all.
  template <class Get, class Put>
  TBF_HD uint64_t scan(int64_t n, const Get& get, const Put& put) {
    uint64_t before = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t own = get(i);
      put(i, before);
      before += own;
    }
    return before;
  }

  // places <- those i for which flags[i] is 1, not 0; returns their number.
  TBF_HD int64_t compact(int64_t n, const uint8_t* flags, uint32_t* places) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {  // without a branch that nobody could predict
      places[count] = uint32_t(i);
      count += flags[i];
    }
    return count;
  }

  TBF_HD void sort(uint64_t* keys, int64_t n) { std::sort(keys, keys + n); }

  // Sorts key(i) of those i for which keys[i] is 1, whose top 32 bits are uniformly random: into
  // buckets by their first bits, one key in each on average, then among neighbours.
  template <class F>
  TBF_HD int64_t sort_spread(int64_t n, uint64_t*& keys, const F& key) {
    int bits = 1;
    while (int64_t{1} << bits < n) ++bits;
    const int shift = 64 - bits;
    std::fill_n(buckets, (size_t{1} << bits) + 1, 0u);
    for (int64_t i = 0; i < n; ++i) buckets[size_t(key(i) >> shift) + 1] += uint32_t(keys[i]);
    for (size_t bucket = 1; bucket < size_t{1} << bits; ++bucket) {
      buckets[bucket] += buckets[bucket - 1];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!keys[i]) continue;
      const uint64_t own = key(i);
      spare[buckets[size_t(own >> shift)]++] = own;
      ++count;
    }
    std::swap(keys, spare);
    sort_neighbours(keys, count);
    return count;
  }

  typedef uint64_t Vector __attribute__((vector_size(kLane * sizeof(uint64_t))));

  // Odd-even transpositions until all is in order: a few where every key is near its place.
  TBF_HD static void sort_neighbours(uint64_t* keys, int64_t count) {
    std::fill_n(keys + count, kLane, ~uint64_t{0});
    for (int pass = 0;; ++pass) {
      for (int64_t j = pass & 1; j < count; j += kLane) {
        Vector own, other;
        std::memcpy(&own, keys + j, sizeof own);
        other = __builtin_shufflevector(own, own, 1, 0, 3, 2, 5, 4, 7, 6);
        const Vector less = own < other ? own : other, more = own < other ? other : own;
        own = __builtin_shufflevector(less, more, 0, 9, 2, 11, 4, 13, 6, 15);
        std::memcpy(keys + j, &own, sizeof own);
      }
      if (pass < 3 || pass % 2 == 0) continue;
      uint64_t wrong = 0;
      for (int64_t j = 1; j < count; ++j) wrong += keys[j - 1] > keys[j];
      if (wrong == 0) return;
    }
  }
};

}  // namespace tbf
