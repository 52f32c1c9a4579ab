// What the ops of heads of packed sequences share on the CPU: operands, the sizes of tiles, and
// (sequence, head) pairs shared out among threads. tiles.h works on one of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace tbf {

constexpr int64_t kQueries = 32;  // of a tile: two bands of 16, as dropout is drawn
constexpr int64_t kKeys = 128;    // of a block: 16 KB of scores
constexpr int64_t kSpare = 16;    // rows beyond a matrix that a product may touch
constexpr int64_t kTurns = 4;     // of a thread, at least, where there are enough pairs

struct BFloat16 {
  uint16_t bits;
};

// (T, H, D) numbers, the D of a head adjacent; strides in numbers.
struct Heads {
  const void* at;
  int64_t row, head;
};

// Where each packed sequence begins; (sequences + 1,).
struct Sequences {
  const int32_t* cu_seqlens;
  int64_t count;
};

// A sequence's first token, length and number, and the head.
struct Pair {
  int64_t first, length, sequence, head;
};

// Of a head's rows: `padded` is the width, rounded up to whole vectors of any instruction set.
struct Sizes {
  int64_t heads, width, padded;
};

inline int64_t whole_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Zeroed arrays that begin a cache line.
class Arrays {
 public:
  float* take(int64_t count) {
    constexpr uintptr_t kLine = 64;
    kept_.emplace_back(size_t(count) + kLine / sizeof(float));
    const uintptr_t at = reinterpret_cast<uintptr_t>(kept_.back().data());
    return kept_.back().data() + (kLine - at % kLine) % kLine / sizeof(float);
  }

 private:
  std::vector<std::vector<float>> kept_;
};

inline int64_t longest_of(const Sequences& sequences) {
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences.count; ++b) {
    longest = std::max<int64_t>(longest, sequences.cu_seqlens[b + 1] - sequences.cu_seqlens[b]);
  }
  return longest;
}

// body(pair, workspace) for every (sequence, head), on whichever thread is free; each thread makes
// its workspace(longest sequence, arrays).
template <class Make, class Body>
void each_pair(const Sequences& sequences, int64_t heads, int threads, const Make& workspace,
               const Body& body) {
  const int64_t longest = longest_of(sequences);
  const int64_t pairs = longest > 0 ? sequences.count * heads : 0;
  // Heads of a sequence share cache lines, so one thread takes several; but not too many at a time.
  const int64_t several =
      std::max<int64_t>(1, std::min(heads, pairs / (kTurns * std::max(threads, 1))));
  std::atomic<int64_t> next{0};
  run_parts(int(std::min<int64_t>(threads, pairs)), [&](int) {
    Arrays arrays;
    const auto w = workspace(longest, arrays);
    for (int64_t from = next.fetch_add(several); from < pairs; from = next.fetch_add(several)) {
      for (int64_t n = from; n < std::min(from + several, pairs); ++n) {
        const int64_t b = n / heads, first = sequences.cu_seqlens[b];
        body(Pair{first, sequences.cu_seqlens[b + 1] - first, b, n % heads}, w);
      }
    }
  });
}

}  // namespace tbf
