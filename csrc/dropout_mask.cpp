#include "dropout_mask.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "philox.h"

namespace tbf {
namespace {

constexpr int kBand = 16;   // rows of attention cells, of which a call covers i and i + 8
constexpr int kTile = 32;   // columns of attention cells, which four calls cover
constexpr int kBytes = 16;  // of a call

typedef uint32_t Four __attribute__((vector_size(16)));

// One word of four calls -> the 8 columns that it has in their tile of 32: bytes `byte` are those
// of columns 2 g, bytes `byte` + 2 those of columns 2 g + 1.
TBF_HD void spread(const uint32_t* words, int byte, uint32_t threshold, float* out) {
  constexpr uint32_t one = 0x3F800000;  // 1.0f
  Four own;
  std::memcpy(&own, words, sizeof own);
  const Four even = ((own >> (8 * byte) & 0xFF) >= threshold) & one;
  const Four odd = ((own >> (8 * byte + 16) & 0xFF) >= threshold) & one;
  const Four both[2] = {TBF_SHUFFLE(Four, even, odd, 0, 4, 1, 5),
                        TBF_SHUFFLE(Four, even, odd, 2, 6, 3, 7)};
  std::memcpy(out, both, sizeof both);
}

struct AttentionCells {
  Key key;
  AttentionPlace place;
  uint32_t threshold;
  float* keep;
};

// One (sequence, head) matrix and one band of 16 rows after the other. Four calls cover a tile of
// two rows, i and i + 8, and 32 columns; kLanes / 4 tiles are drawn at a time.
TBF_HD void attention_bands_body(const AttentionCells& cells, int64_t from, int64_t to) {
  const AttentionPlace& at = cells.place;
  const int64_t bands = (at.queries + kBand - 1) / kBand, across = (at.keys + kTile - 1) / kTile;
  for (int64_t item = from; item < to; ++item) {
    const int64_t matrix = item / bands, band = item % bands;
    const uint32_t head = uint32_t(at.first_head + matrix % at.heads);
    const uint32_t sequence = uint32_t(at.sequences[matrix / at.heads]);
    float* const top = cells.keep + (matrix * at.queries + band * kBand) * at.keys;
    const int64_t rows = std::min<int64_t>(kBand / 2, at.queries - band * kBand);
    const int64_t tiles = rows * across, row_call = (at.first / kBand + band) * (kBand / 2);
    for (int64_t tile = 0; tile < tiles; tile += kLanes / 4) {
      Lanes x;
      for (int quad = 0; quad < kLanes / 4; ++quad) {
        const int64_t own = std::min(tile + quad, tiles - 1);
        const uint32_t column_call = uint32_t(at.tiles[own % across] * 4);
        for (int lane = 0; lane < 4; ++lane) {
          x.put(4 * quad + lane, {column_call + uint32_t(lane), uint32_t(row_call + own / across),
                                  head, sequence});
        }
      }
      x.philox(cells.key);
      for (int quad = 0; quad < kLanes / 4 && tile + quad < tiles; ++quad) {
        const int64_t row = (tile + quad) / across, j = (tile + quad) % across * kTile;
        for (int half = 0; half < 2; ++half) {
          if (band * kBand + row + 8 * half >= at.queries) break;
          float edge[kTile];
          float* const row_at = top + (row + 8 * half) * at.keys + j;
          float* const out = j + kTile <= at.keys ? row_at : edge;
          spread(x.c0 + 4 * quad, half, cells.threshold, out);
          spread(x.c1 + 4 * quad, half, cells.threshold, out + 8);
          spread(x.c2 + 4 * quad, half, cells.threshold, out + 16);
          spread(x.c3 + 4 * quad, half, cells.threshold, out + 24);
          if (out == edge) std::memcpy(row_at, edge, size_t(at.keys - j) * sizeof(float));
        }
      }
    }
  }
}

TBF_VARIANTS(attention_bands, (const AttentionCells& cells, int64_t from, int64_t to),
             (cells, from, to))

struct HiddenCells {
  Key key;
  const int32_t* sequences;
  const int32_t* positions;
  int64_t columns;
  uint8_t* out;
};

// Calls from..to of all rows, one for 16 columns.
TBF_HD void hidden_calls_body(const HiddenCells& cells, int64_t from, int64_t to) {
  const int64_t calls = (cells.columns + kBytes - 1) / kBytes;  // of a row
  for (int64_t first = from; first < to; first += kLanes) {
    const int live = int(std::min<int64_t>(kLanes, to - first));
    Lanes x{};
    for (int lane = 0; lane < live; ++lane) {
      const int64_t row = (first + lane) / calls;
      x.put(lane, {uint32_t((first + lane) % calls), uint32_t(cells.positions[row]), 0,
                   uint32_t(cells.sequences[row])});
    }
    x.philox(cells.key);
    for (int lane = 0; lane < live; ++lane) {
      const int64_t row = (first + lane) / calls, column = (first + lane) % calls * kBytes;
      const Words words = x.at(lane);
      const int64_t wide = std::min<int64_t>(kBytes, cells.columns - column);
      std::memcpy(cells.out + row * cells.columns + column, &words, size_t(wide));
    }
  }
}

TBF_VARIANTS(hidden_calls, (const HiddenCells& cells, int64_t from, int64_t to), (cells, from, to))

}  // namespace

void attention_keep_cpu(const DropoutSite& at, const AttentionPlace& place, int threshold,
                        float* keep, int threads) {
  const AttentionCells cells{site_key(at.seed0, at.seed1, at.site), place, uint32_t(threshold),
                             keep};
  const int64_t bands = (place.queries + kBand - 1) / kBand;
  parallel_rows(place.count * place.heads * bands, threads, [&](int64_t from, int64_t to, int) {
    TBF_BEST(attention_bands)(cells, from, to);
  });
}

void hidden_cells_cpu(const DropoutSite& at, const int32_t* sequences, const int32_t* positions,
                      int64_t rows, int64_t columns, uint8_t* cells, int threads) {
  const HiddenCells all{site_key(at.seed0, at.seed1, at.site), sequences, positions, columns,
                        cells};
  const int64_t calls = (columns + kBytes - 1) / kBytes;
  parallel_rows(rows * calls, threads,
                [&](int64_t from, int64_t to, int) { TBF_BEST(hidden_calls)(all, from, to); });
}

}  // namespace tbf
