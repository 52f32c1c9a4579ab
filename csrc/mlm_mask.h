// Exact-count masking of one row of tokens, in integers, for one thread or for a block of them.
//
//   w_i = eligible_i * g(place_i) * h(token_i)                         31 bits
//   k   = min(#{w_i > 0}, max(1, round(ratio * #eligible)))
//   p_i = min(1, lambda * w_i), lambda such that sum p_i = k           32.32 fixed point
//
// Token mode draws by systematic sampling (Madow 1949) over a random permutation: in the order of
// (random word, position), token i is chosen where the running sum of p crosses offset + j * 2^32.
// So exactly k tokens are chosen, token i with probability exactly p_i, whatever the order is.
//
// Word and span mode choose whole units (words; runs of 1 to 10 words whose length is geometric, as
// in Joshi et al. 2020, arXiv:1907.10529) by sequential Poisson sampling (Ohlsson 1998): in the
// order of random word / mean weight, a unit is taken if it still fits into k. So the count is at
// most k, and more than k minus the longest unit.
//
// Every draw is Philox of (stream and token index, example id, step) under the seed. No floating
// point: both devices and reference/mlm_mask.py agree on every bit.
#pragma once

#include "philox.h"

namespace tbf {

constexpr int kWidthBits = 13;
constexpr int64_t kMaxWidth = int64_t{1} << kWidthBits;  // tokens of a row
constexpr uint64_t kOne = uint64_t{1} << 32;  // probability 1

enum Stream : uint32_t { kOrder = 0, kOffset = 1, kAction = 2, kSpan = 3 };
enum Unit : int { kToken = 0, kWord = 1, kSpanUnit = 2 };

// Flags of one byte (bool, uint8) or eight (int64), or none.
struct Flags {
  const void* data;
  int bytes;

  TBF_HD explicit operator bool() const { return data != nullptr; }

  TBF_HD bool at(int64_t i) const {
    if (bytes == 1) return static_cast<const uint8_t*>(data)[i] != 0;
    return static_cast<const int64_t*>(data)[i] != 0;
  }

  // keep[i] <- 0 where flag `base + i` is not `wanted`.
  template <class Team>
  TBF_HD void filter(Team& team, int64_t base, int64_t n, bool wanted, uint8_t* keep) const {
    if (data == nullptr) return;
    if (bytes == 1) {
      const uint8_t* const flags = static_cast<const uint8_t*>(data) + base;
      team.each(n, [&](int64_t i) { keep[i] &= uint8_t((flags[i] != 0) == wanted); });
    } else {
      const int64_t* const flags = static_cast<const int64_t*>(data) + base;
      team.each(n, [&](int64_t i) { keep[i] &= uint8_t((flags[i] != 0) == wanted); });
    }
  }
};

struct MlmMask {
  // operands
  int64_t* ids;             // (batch, width); chosen tokens are replaced
  int64_t batch, width;
  Flags special;            // (batch, width): not eligible
  Flags attention;          // (batch, width): real tokens; none: all
  Flags starts;             // (batch, width): begins a word; none in token mode
  const int64_t* examples;  // (batch,) ids; null: 0, 1, ...
  // tables
  const uint32_t* table;  // (vocabulary,): weight << 1 | eligible
  int64_t vocabulary;
  const uint32_t* places;  // (place_count,) 32-bit g over a row's real tokens; null: 1
  int64_t place_count;
  const int64_t* ordinary;  // (ordinary_count,) ids that may replace a token
  int64_t ordinary_count;
  // numbers
  int64_t mask_id;
  uint64_t ratio;                      // in units of 2^-32
  uint64_t mask_below, random_below;   // of an action word: [MASK], else a random token
  uint64_t seed;
  uint32_t step;
  int unit;
  int64_t* dense;  // (batch, width) labels, -100 where nothing is masked; or null
};

// One row's scratch, `width` of each; on a GPU as many keys as the next power of two.
struct RowScratch {
  uint64_t* keys;     // p, then the order of tokens; in unit modes the order of units
  uint32_t* weights;  // w; in unit modes the length of the unit that begins here
  uint32_t* words;    // the permutation's random words; in unit modes the first token of the unit
  uint8_t* chosen;
};

struct Totals {
  uint64_t eligible, positive, weight, heaviest;

  TBF_HD Totals operator+(const Totals& other) const {
    return {eligible + other.eligible, positive + other.positive, weight + other.weight,
            heaviest > other.heaviest ? heaviest : other.heaviest};
  }
};

TBF_HD Words counter(const MlmMask& call, uint64_t example, Stream stream, uint32_t index) {
  return {uint32_t(stream) << 28 | index, uint32_t(example), uint32_t(example >> 32), call.step};
}

TBF_HD Words draw(const MlmMask& call, uint64_t example, Stream stream, uint32_t index) {
  return philox(counter(call, example, stream, index), key_of(call.seed));
}

// round(ratio * n), at least 1.
TBF_HD uint64_t wanted(const MlmMask& call, uint64_t n) {
  const uint64_t count = (n * call.ratio + (uint64_t{1} << 31)) >> 32;
  return count < 1 ? 1 : count;
}

// g(place) * h(token): the product of a 31-bit and a 32-bit weight, rounded, 0 only if one is 0.
TBF_HD uint32_t weighted(uint32_t token, uint32_t place) {
  if (token == 0 || place == 0) return 0;
  const uint64_t product = (uint64_t{token} * place + (uint64_t{1} << 31)) >> 32;
  return product == 0 ? 1 : uint32_t(product);
}

// floor(w * left * 2^32 / total) for w * left < total, by one reciprocal for the whole row.
struct Share {
  uint64_t left, total, reciprocal;  // floor(left * 2^64 / total)

  TBF_HD Share(uint64_t left_, uint64_t total_) : left(left_), total(total_), reciprocal(0) {
    if (total == 0) return;
    uint64_t rest = left;
    for (int digit = 0; digit < 4; ++digit) {  // 16 bits each: rest < total < 2^45
      reciprocal = reciprocal << 16 | (rest << 16) / total;
      rest = (rest << 16) % total;
    }
  }

  TBF_HD uint64_t of(uint32_t w) const {
    const uint64_t low = uint64_t{w} * uint32_t(reciprocal);
    const uint64_t share = uint64_t{w} * (reciprocal >> 32) + (low >> 32);
    const uint64_t rest = ((w * left) << 32) - share * total;  // modulo 2^64; below 2 * total
    return share + (rest >= total);
  }
};

// keys[i]: p of token i, up to 2^32.
template <class Team>
TBF_HD void inclusion_probabilities(Team& team, int64_t width, uint64_t k, Totals totals,
                                    RowScratch row) {
  constexpr uint32_t kCapped = 1u << 31;
  uint64_t left = k, total = totals.weight;
  bool more = totals.heaviest * left >= total;
  while (more) {  // each round caps a token at least, or is the last
    const Totals capped = team.template sum<Totals>(width, [&](int64_t i) -> Totals {
      const uint32_t w = row.weights[i];
      if (w == 0 || w >= kCapped || w * left < total) return {0, 0, 0, 0};
      row.weights[i] = w | kCapped;
      return {0, 1, w, 0};
    });
    left -= capped.positive;
    total -= capped.weight;
    more = capped.positive > 0 && left > 0;
  }
  const Share share(left, total);
  const uint64_t given = team.template sum<uint64_t>(width, [&](int64_t i) -> uint64_t {
    const uint32_t w = row.weights[i];
    const uint64_t own = w == 0 || w >= kCapped ? 0 : share.of(w);
    row.keys[i] = own;
    return own;
  });
  // What rounding down left over goes to the first of those that are not capped, one unit each.
  const int64_t rest = int64_t((left << 32) - given);
  const int64_t cut = team.nth(width, rest, [&](int64_t i) -> uint64_t {
    return row.weights[i] != 0 && row.weights[i] < kCapped;
  });
  team.each(width, [&](int64_t i) {
    const uint32_t w = row.weights[i];
    row.keys[i] = w == 0 ? 0 : w >= kCapped ? kOne : row.keys[i] + (i < cut);
  });
}

template <class Team>
TBF_HD void choose_tokens(Team& team, const MlmMask& call, uint64_t example, uint64_t k,
                          Totals totals, RowScratch row) {
  const int64_t width = call.width;
  inclusion_probabilities(team, width, k, totals, row);
  team.draw(
      (width + 3) / 4, key_of(call.seed),
      [&](int64_t group) { return counter(call, example, kOrder, uint32_t(group)); },
      [&](int64_t group, Words words) {
        row.words[4 * group] = words.w0;
        row.words[4 * group + 1] = words.w1;
        row.words[4 * group + 2] = words.w2;
        row.words[4 * group + 3] = words.w3;
      });
  const uint64_t offset = draw(call, example, kOffset, 0).w0;
  team.crossings(
      width, row.keys, row.weights, kOne - 1 - offset,
      [&](int64_t i) -> uint64_t { return uint64_t{row.words[i]} << 32 | uint64_t(i); },
      [&](int64_t i, bool crossed) { row.chosen[i] = crossed; });
}

// Words of a span: 1 to 10 with probabilities proportional to 0.8^length, 3.8 on average.
TBF_HD int span_length(uint32_t word) {
  constexpr uint32_t up_to[] = {  // P(length <= 1, 2, ...) in units of 2^-32
      962321997,  1732179594, 2348065672, 2840774535, 3234941624,
      3550275296, 3802542234, 4004355784, 4165806624};
  int length = 1;
  for (const uint32_t bound : up_to) length += word >= bound;
  return length;
}

// Cuts the eligible tokens into units. On entry words[i] says whether token i is eligible;
// afterwards it is its unit's first token, and weights[first] is the unit's length. Leaves mean
// weight << 13 | first token in `keys` for those that can be chosen, and returns their number.
TBF_HD int64_t cut_into_units(const MlmMask& call, uint64_t example, int64_t base,
                              RowScratch row) {
  int64_t units = 0;
  for (int64_t first = 0; first < call.width;) {
    if (!row.words[first]) {
      ++first;
      continue;
    }
    int words = 1;
    if (call.unit == kSpanUnit) {
      words = span_length(draw(call, example, kSpan, uint32_t(first)).w0);
    }
    uint64_t weight = row.weights[first];
    int64_t stop = first + 1;
    for (; stop < call.width && row.words[stop]; ++stop) {
      if (call.starts.at(base + stop) && --words == 0) break;
      weight += row.weights[stop];
      row.words[stop] = uint32_t(first);
    }
    row.words[first] = uint32_t(first);
    const uint64_t length = uint64_t(stop - first);
    row.weights[first] = uint32_t(length);
    row.keys[units] = weight / length << kWidthBits | uint64_t(first);
    units += weight > 0;
    first = stop;
  }
  return units;
}

template <class Team>
TBF_HD void choose_units(Team& team, const MlmMask& call, uint64_t example, int64_t base,
                         uint64_t k, RowScratch row) {
  constexpr uint64_t kFirst = kMaxWidth - 1;
  const int64_t units =
      team.once([&]() -> int64_t { return cut_into_units(call, example, base, row); });
  team.draw(
      units, key_of(call.seed),
      [&](int64_t u) { return counter(call, example, kOrder, uint32_t(row.keys[u] & kFirst)); },
      [&](int64_t u, Words words) {  // rank << 13 | first token, by 16 bits of the mean weight
        const uint64_t mean = row.keys[u] >> kWidthBits >> 15, first = row.keys[u] & kFirst;
        const uint64_t rank = (uint64_t{words.w0} << 16) / (mean == 0 ? 1 : mean);
        row.keys[u] = rank << kWidthBits | first;
      });
  uint64_t count = 0;
  team.in_order(row.keys, units, [&](uint64_t key) {
    const uint32_t first = uint32_t(key & kFirst), length = row.weights[first];
    if (count + length <= k) {
      count += length;
      for (uint32_t i = first; i < first + length; ++i) row.chosen[i] = 1;
    }
    return count < k;
  });
}

// What a chosen token becomes, by its two random words. Without a branch: nobody could predict it.
TBF_HD int64_t replacement(const MlmMask& call, int64_t id, uint64_t action, uint32_t word) {
  const int64_t other = call.ordinary[uint64_t{word} * uint64_t(call.ordinary_count) >> 32];
  const int64_t masked = -int64_t(action < call.mask_below);
  const int64_t random = -int64_t(action < call.random_below) & ~masked;
  return (call.mask_id & masked) | (other & random) | (id & ~(masked | random));
}

// Masks one row; found(rank, i, id) is told of each chosen token. Returns their number, or -1 - i
// where token i is outside the vocabulary (on a GPU the kernel stops instead).
template <class Team, class Found>
TBF_HD int64_t mask_row(Team& team, const MlmMask& call, int64_t b, RowScratch row,
                        const Found& found) {
  const int64_t width = call.width, base = b * width;
  const uint64_t example = call.examples ? uint64_t(call.examples[b]) : uint64_t(b);
  const int64_t* const ids = call.ids + base;
  const int64_t outside = team.first(
      width, [&](int64_t i) { return uint64_t(ids[i]) >= uint64_t(call.vocabulary); });
  if (outside >= 0) return -1 - outside;

  uint8_t* const open = row.chosen;
  team.each(width, [&](int64_t i) { open[i] = 1; });
  call.attention.filter(team, base, width, true, open);
  call.special.filter(team, base, width, false, open);
  team.each(width, [&](int64_t i) {  // table entries
    row.words[i] = call.table[ids[i]] & -uint32_t{open[i]};
    row.weights[i] = row.words[i] >> 1;
    row.words[i] &= 1;
  });
  if (call.places) {
    auto real = [&](int64_t i) -> uint64_t {
      return !call.attention || call.attention.at(base + i);
    };
    const uint64_t length = team.template sum<uint64_t>(width, real);
    team.scan(width, real, [&](int64_t i, uint64_t rank) {
      const uint64_t place = length ? rank * uint64_t(call.place_count) / length : 0;
      row.weights[i] = real(i) ? weighted(row.weights[i], call.places[place]) : 0;
    });
  }
  const Totals totals = team.template sum<Totals>(width, [&](int64_t i) -> Totals {
    const uint32_t w = row.weights[i];
    return {row.words[i], w > 0, w, w};
  });
  uint64_t k = wanted(call, totals.eligible);
  k = k < totals.positive ? k : totals.positive;

  team.each(width, [&](int64_t i) { row.chosen[i] = 0; });
  if (k > 0 && call.unit == kToken) choose_tokens(team, call, example, k, totals, row);
  if (k > 0 && call.unit != kToken) choose_units(team, call, example, base, k, row);
  uint32_t* const places = row.weights;  // which nobody reads any more
  const int64_t count = team.compact(width, row.chosen, places);
  if (call.dense) team.each(width, [&](int64_t i) { call.dense[base + i] = -100; });
  team.draw(
      count, key_of(call.seed),
      [&](int64_t j) { return counter(call, example, kAction, places[j]); },
      [&](int64_t j, Words own) {
        const uint32_t i = places[j];
        uint32_t action = own.w0;
        if (call.unit == kSpanUnit && row.words[i] != i) {  // the span's, not its own
          action = draw(call, example, kAction, row.words[i]).w0;
        }
        const int64_t id = ids[i];
        call.ids[base + i] = replacement(call, id, action, own.w1);
        if (call.dense) call.dense[base + i] = id;
        found(j, int64_t(i), id);
      });
  return count;
}

}  // namespace tbf
