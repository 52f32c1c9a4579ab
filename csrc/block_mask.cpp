// block_mask on the CPU: rows of blocks shared out among threads.
#include "block_mask.h"

#include "entries.h"
#include "parallel.h"
#include "serial_team.h"

namespace tbf {

void block_mask_kinds_cpu(const Pattern& pattern, uint8_t* kinds, int threads) {
  const int64_t n = pattern.count();
  parallel_rows(pattern.masks * n, threads, [&](int64_t from, int64_t to, int) {
    Serial team;
    for (int64_t row = from; row < to; ++row) {
      for (int64_t c = 0; c < n; ++c) {
        kinds[row * n + c] = kind_of(team, pattern, row / n, row % n, c);
      }
    }
  });
}

void block_mask_fill_cpu(const Pattern& pattern, const PatternLists& lists, uint32_t* cells,
                         int threads) {
  const int64_t n = pattern.count(), words = pattern.side * pattern.side / kWordBits;
  Serial team;
  fill_lists(team, pattern, lists, true);
  fill_lists(team, pattern, lists, false);
  parallel_rows(pattern.masks * n, threads, [&](int64_t from, int64_t to, int) {
    Serial own;
    for (int64_t row = from; row < to; ++row) {
      for (int64_t c = 0; c < n; ++c) {
        if (lists.kinds[row * n + c] != kPartial) continue;
        fill_cells(own, pattern, row / n, row % n, c, cells + lists.tile_of[row * n + c] * words);
      }
    }
  });
}

}  // namespace tbf
