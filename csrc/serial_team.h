// The methods that a row function asks of its team, for one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "philox.h"

namespace tbf {

// One thread as the team of a row function; cuda_team.cuh has the same methods for many.
struct Serial {
  static constexpr int kLane = 8;  // keys of a vector

  // Of `crossings`: room for n + kLane + 1 keys, and for 2 * n + 2 numbers each.
  uint64_t* spare = nullptr;
  uint64_t* sums = nullptr;
  uint32_t* slots = nullptr;

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

  // use(key) in increasing order until it says false; few are asked for, so a heap, no sort.
  template <class Use>
  TBF_HD void in_order(uint64_t* keys, int64_t n, const Use& use) {
    std::make_heap(keys, keys + n, std::greater<>());
    for (; n > 0 && use(keys[0]); --n) std::pop_heap(keys, keys + n, std::greater<>());
  }

  // In the order of key(i), over those i whose sizes[i] is not 0: hit(i, whether adding sizes[i] to
  // `start` and all sizes before it crosses a multiple of 2^32). The top 32 bits of a key are
  // random, so its first bits name a bucket; only buckets with a crossing inside are put in order.
  // Neither `sizes` nor `scratch`, of n numbers, means anything afterwards.
  template <class Key, class Hit>
  TBF_HD void crossings(int64_t n, uint64_t* sizes, uint32_t* scratch, uint64_t start,
                        const Key& key, const Hit& hit) {
    uint32_t* const bucket_of = scratch;
    constexpr int kTally = 48;  // sums of sizes are below 2^46; how many there are, above them
    constexpr uint64_t kSizes = (uint64_t{1} << kTally) - 1;
    int bits = 1;
    while (int64_t{1} << bits < n) ++bits;
    const int shift = 64 - bits;
    const uint32_t count = 1u << bits, nowhere = uint32_t(n);
    for (int64_t i = 0; i < n; ++i) {
      bucket_of[i] = sizes[i] ? uint32_t(key(i) >> shift) : count;
      sizes[i] |= sizes[i] ? uint64_t{1} << kTally : 0;
    }
    std::fill_n(sums, count + 1, uint64_t{0});
    for (int64_t i = 0; i < n; ++i) sums[bucket_of[i]] += sizes[i];
    uint32_t live = 0;
    for (uint32_t bucket = 0; bucket < count; ++bucket) {
      const uint64_t own = sums[bucket], stop = start + (own & kSizes);
      const uint32_t crossed = -uint32_t((start ^ stop) >> 32 != 0);  // all ones: no branch
      sums[bucket] = start;
      slots[bucket] = (live & crossed) | (nowhere & ~crossed);
      live += uint32_t(own >> kTally) & crossed;
      start = stop;
    }
    slots[count] = nowhere;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t& slot = slots[bucket_of[i]];
      const uint32_t at = slot;
      spare[at] = key(i);
      slot = at + (at != nowhere);
    }
    sort_neighbours(spare, live);
    uint64_t before = 0;
    uint32_t last = count;
    for (uint32_t j = 0; j < live; ++j) {
      const uint32_t i = uint32_t(spare[j]), bucket = bucket_of[i];
      const uint64_t same = -uint64_t(bucket == last);
      before = (before & same) | (sums[bucket] & ~same);
      const uint64_t after = before + (sizes[i] & kSizes);
      hit(int64_t(i), (before ^ after) >> 32 != 0);
      before = after;
      last = bucket;
    }
  }

  typedef uint64_t Vector __attribute__((vector_size(kLane * sizeof(uint64_t))));

  // Odd-even transpositions until all is in order: a few where every key is near its place.
  TBF_HD static void sort_neighbours(uint64_t* keys, int64_t count) {
    std::fill_n(keys + count, kLane, ~uint64_t{0});
    for (int pass = 0;; ++pass) {
      for (int64_t j = pass & 1; j < count; j += kLane) {
        Vector own, other;
        std::memcpy(&own, keys + j, sizeof own);
        other = TBF_SHUFFLE(Vector, own, own, 1, 0, 3, 2, 5, 4, 7, 6);
        const Vector less = own < other ? own : other, more = own < other ? other : own;
        own = TBF_SHUFFLE(Vector, less, more, 0, 9, 2, 11, 4, 13, 6, 15);
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
