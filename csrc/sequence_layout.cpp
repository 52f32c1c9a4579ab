// sequence_layout on the CPU.
#include "sequence_layout.h"

#include "entries.h"
#include "parallel.h"
#include "serial_team.h"

namespace tbf {

void sequence_extents_cpu(const Padding& padding, int64_t* extents, int threads) {
  parallel_rows(padding.batch, threads, [&](int64_t from, int64_t to, int) {
    for (int64_t b = from; b < to; ++b) {
      const uint8_t* const real = padding.real + b * padding.width;
      Extent extent{0, 0, 0};
      for (int64_t n = 0; n < padding.width; ++n) extent.length += real[n] != 0;
      while (extent.length > 0 && !real[extent.first]) ++extent.first;
      if (extent.length > 0) extent.stop = padding.width;
      while (extent.stop > 0 && !real[extent.stop - 1]) --extent.stop;
      extents[b] = extent.length;
      extents[padding.batch + b] = extent.first;
      extents[2 * padding.batch + b] = extent.stop;
    }
  });
}

void sequence_layout_cpu(const Padding& padding, const PackedRows& packed, int threads) {
  parallel_rows(padding.batch, threads, [&](int64_t from, int64_t to, int) {
    Serial team;
    for (int64_t b = from; b < to; ++b) place_row(team, padding, b, packed);
  });
}

}  // namespace tbf
