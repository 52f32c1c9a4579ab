// A block-sparse attention pattern, 32 pairs at a time, and its lists of blocks.
//
// Query i may attend to key j of mask m where
//
//     |i - j| <= window,  or their blocks are at most window_blocks apart,  or i or j is global,
//     or their block was drawn at random;
//     and both are in one document  and both are below the length of m  and dense[m, i, j]
//
// `everything` stands for the first two lines; a null pointer leaves out its condition. The lists
// are those of reference/block_mask.py.
#pragma once

#include "philox.h"

namespace tbf {

constexpr int kWordBits = 32;
enum Kind : uint8_t { kNone = 0, kPartial = 1, kFull = 2 };

struct Pattern {
  int64_t size, masks, side;  // N, M, positions of a block
  bool everything;
  int64_t window;                // tokens to either side; -1: none
  int64_t window_blocks;         // blocks to either side; -1: none
  const uint32_t* global;        // a bit for each token, and 0 for what fills up the last block
  int64_t random_blocks;         // of each row of blocks
  uint64_t seed;
  const int32_t* document_first;  // (M, N): first position of i's document
  const int32_t* document_stop;   // (M, N): one past its last
  const int64_t* lengths;         // (M,)
  const uint8_t* dense;           // (M, N, N)

  TBF_HD int64_t count() const { return (size + side - 1) / side; }
};

TBF_HD uint32_t bits(int64_t from, int64_t to, int64_t base) {  // j - base for j in from..to-1
  from = from > base ? from - base : 0;
  to = to < base + kWordBits ? to - base : kWordBits;
  if (from >= to) return 0;
  const uint32_t up_to = to == kWordBits ? ~0u : (1u << to) - 1;
  return up_to & ~((1u << from) - 1);
}

// Whether random blocks may be drawn from key block c for query block r: no other rule meets it.
TBF_HD bool open_block(const Pattern& pattern, int64_t r, int64_t c) {
  const int64_t blocks = r > c ? r - c : c - r;
  const int64_t tokens = blocks == 0 ? 0 : (blocks - 1) * pattern.side + 1;
  if (tokens <= pattern.window || blocks <= pattern.window_blocks) return false;
  if (!pattern.global) return true;
  const int64_t words = pattern.side / kWordBits;
  uint32_t marked = 0;
  for (int64_t word = c * words; word < (c + 1) * words; ++word) marked |= pattern.global[word];
  return marked == 0;
}

TBF_HD uint64_t random_rank(const Pattern& pattern, int64_t r, int64_t c) {
  const Words words = philox({uint32_t(c), uint32_t(r), 0, 0}, key_of(pattern.seed));
  return uint64_t{words.w0} << 32 | uint64_t(c);
}

// Whether key block c is one of the `random_blocks` open ones with the smallest ranks in row r.
TBF_HD bool drawn_block(const Pattern& pattern, int64_t r, int64_t c) {
  if (pattern.random_blocks == 0 || !open_block(pattern, r, c)) return false;
  const uint64_t own = random_rank(pattern, r, c);
  int64_t before = 0;
  for (int64_t other = 0; other < pattern.count() && before < pattern.random_blocks; ++other) {
    before += random_rank(pattern, r, other) < own && open_block(pattern, r, other);
  }
  return before < pattern.random_blocks;
}

// The pairs (i, base), ..., (i, base + 31) of mask m; `drawn` is drawn_block of their block.
TBF_HD uint32_t allowed_word(const Pattern& pattern, int64_t m, int64_t i, int64_t base,
                             bool drawn) {
  const int64_t size = pattern.size;
  const int64_t length = pattern.lengths ? pattern.lengths[m] : size;
  if (i >= length) return 0;
  uint32_t word = pattern.everything || drawn ? ~0u : 0;
  const int64_t apart = i / pattern.side - base / pattern.side;
  if (apart <= pattern.window_blocks && -apart <= pattern.window_blocks) word = ~0u;
  if (pattern.window >= 0) word |= bits(i - pattern.window, i + pattern.window + 1, base);
  if (pattern.global) {
    if (pattern.global[i / kWordBits] >> i % kWordBits & 1) word = ~0u;
    word |= pattern.global[base / kWordBits];
  }
  word &= bits(0, length, base);
  if (pattern.document_first) {
    word &= bits(pattern.document_first[m * size + i], pattern.document_stop[m * size + i], base);
  }
  if (pattern.dense && word) {
    const uint8_t* row = pattern.dense + (m * size + i) * size;
    uint32_t own = 0;
    for (int bit = 0; bit < kWordBits && base + bit < size; ++bit) {
      own |= uint32_t(row[base + bit] != 0) << bit;
    }
    word &= own;
  }
  return word;
}

// What block (r, c) of mask m is. `team` shares out its rows.
template <class Team>
TBF_HD Kind kind_of(Team& team, const Pattern& pattern, int64_t m, int64_t r, int64_t c) {
  const int64_t side = pattern.side, words = side / kWordBits;
  const bool drawn = drawn_block(pattern, r, c);
  const int64_t rows = pattern.size - r * side < side ? pattern.size - r * side : side;
  const uint64_t seen = team.template sum<uint64_t>(rows, [&](int64_t row) -> uint64_t {
    bool some = false, all = true;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t base = c * side + word * kWordBits;
      const uint32_t own = allowed_word(pattern, m, r * side + row, base, drawn);
      some |= own != 0;
      all &= own == bits(0, pattern.size, base);
    }
    return uint64_t{some} | uint64_t{all} << 32;
  });
  if (uint32_t(seen) == 0) return kNone;
  return int64_t(seen >> 32) == rows ? kFull : kPartial;
}

// The cells of a partial block: (side, side / 32) words.
template <class Team>
TBF_HD void fill_cells(Team& team, const Pattern& pattern, int64_t m, int64_t r, int64_t c,
                       uint32_t* cells) {
  const int64_t side = pattern.side, words = side / kWordBits;
  const bool drawn = drawn_block(pattern, r, c);
  team.each(side * words, [&](int64_t at) {
    const int64_t i = r * side + at / words, base = c * side + at % words * kWordBits;
    cells[at] = i < pattern.size ? allowed_word(pattern, m, i, base, drawn) : 0;
  });
}

struct PatternLists {
  const uint8_t* kinds;  // (M, n, n)
  int32_t* tile_of;      // (M, n, n): a partial block's place in `cells`
  int32_t* row_offsets;  // (M, 2 n + 1)
  int32_t* row_blocks;   // (E,)
  int32_t* row_tiles;    // (E,)
  int32_t* column_offsets;
  int32_t* column_blocks;
  int32_t* column_tiles;
};

// CSR if `by_row`, else CSC, which needs the tile_of that CSR wrote.
template <class Team>
TBF_HD void fill_lists(Team& team, const Pattern& pattern, const PatternLists& lists,
                       bool by_row) {
  const int64_t n = pattern.count(), segments = pattern.masks * 2 * n;
  int32_t* const offsets = by_row ? lists.row_offsets : lists.column_offsets;
  int32_t* const blocks = by_row ? lists.row_blocks : lists.column_blocks;
  int32_t* const tiles = by_row ? lists.row_tiles : lists.column_tiles;
  team.each(pattern.masks, [&](int64_t m) { offsets[m * (2 * n + 1) + 2 * n] = 0; });  // if n is 0
  auto place = [&](int64_t segment, int64_t other) {
    const int64_t m = segment / (2 * n), own = segment / 2 % n;
    return (m * n + (by_row ? own : other)) * n + (by_row ? other : own);
  };
  auto wanted = [&](int64_t segment) { return segment % 2 == 0 ? kPartial : kFull; };
  team.scan(
      segments,
      [&](int64_t segment) -> uint64_t {  // entries, and partial ones in the upper half
        uint64_t entries = 0;
        for (int64_t other = 0; other < n; ++other) {
          entries += lists.kinds[place(segment, other)] == wanted(segment);
        }
        return entries | (segment % 2 == 0 ? entries << 32 : 0);
      },
      [&](int64_t segment, uint64_t before) {
        int32_t entry = int32_t(uint32_t(before)), tile = int32_t(before >> 32);
        const int64_t m = segment / (2 * n), within = segment % (2 * n);
        offsets[m * (2 * n + 1) + within] = entry;
        for (int64_t other = 0; other < n; ++other) {
          const int64_t at = place(segment, other);
          if (lists.kinds[at] != wanted(segment)) continue;
          if (by_row && segment % 2 == 0) lists.tile_of[at] = tile++;
          blocks[entry] = int32_t(other);
          tiles[entry++] = segment % 2 == 0 ? lists.tile_of[at] : -1;
        }
        if (within == 2 * n - 1) offsets[m * (2 * n + 1) + 2 * n] = entry;
      });
}

}  // namespace tbf
