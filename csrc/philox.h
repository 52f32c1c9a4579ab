// Philox-4x32-10: a 128-bit counter and a 64-bit key -> 128 random bits.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". One source for both devices,
// bit-equal to reference/philox.py and kernels/philox.py.
#pragma once

#include "portable.h"

namespace tbf {

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Key {
  uint32_t k0, k1;
};

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

TBF_HD Words philox(Words counter, Key key) {
  uint32_t c0 = counter.w0, c1 = counter.w1, c2 = counter.w2, c3 = counter.w3;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t{c0} * kMultiplier0;
    const uint64_t product1 = uint64_t{c2} * kMultiplier1;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key.k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key.k1;
    c3 = uint32_t(product0);
    key.k0 += kWeyl0;
    key.k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

TBF_HD Key key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

// The key of one dropout site: Philox of (site, seed[1]) under seed[0].
TBF_HD Key site_key(uint64_t seed0, uint64_t seed1, uint32_t site) {
  const Words words = philox({site, 0, uint32_t(seed1), uint32_t(seed1 >> 32)}, key_of(seed0));
  return {words.w0, words.w1};
}

// Counters, then random words, of several calls side by side: what a compiler turns into vectors.
constexpr int kLanes = 16;

struct Lanes {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];

  TBF_HD void put(int lane, Words counter) {
    c0[lane] = counter.w0;
    c1[lane] = counter.w1;
    c2[lane] = counter.w2;
    c3[lane] = counter.w3;
  }
  TBF_HD Words at(int lane) const { return {c0[lane], c1[lane], c2[lane], c3[lane]}; }

  TBF_HD void philox(Key key) {
    for (int lane = 0; lane < kLanes; ++lane) put(lane, tbf::philox(at(lane), key));
  }
};

}  // namespace tbf
