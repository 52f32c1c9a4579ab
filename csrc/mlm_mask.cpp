// mlm_mask on the CPU: rows shared out among threads, each with its own scratch.
#include <algorithm>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "entries.h"
#include "isa.h"
#include "mlm_mask.h"
#include "parallel.h"
#include "serial_team.h"

namespace tbf {
namespace {

struct Found {
  int32_t i, id;  // a chosen token of a row
};

// The rows of one thread.
struct Part {
  std::unique_ptr<Found[]> found;  // of all rows, one behind another
  int64_t from = 0, to = 0;        // rows that are done
  int64_t outside = -1;            // flat place of a token outside the vocabulary
};

TBF_HD void mask_rows_body(const MlmMask& arguments, int64_t from, int64_t to, int32_t* counts,
                           Part& part) {
  const MlmMask call = arguments;  // a copy that no store can alias
  const size_t width = size_t(call.width);
  std::vector<uint64_t> keys(width), spare(width + Serial::kLane + 1), sums(2 * width + 2);
  std::vector<uint32_t> weights(width + 1), words(width + 4), slots(2 * width + 2);
  std::vector<uint8_t> chosen(width);
  RowScratch row{keys.data(), weights.data(), words.data(), chosen.data()};
  Serial team{spare.data(), sums.data(), slots.data()};
  part.found.reset(new Found[size_t(to - from) * wanted(call, width)]);  // not cleared
  part.from = from;
  Found* found = part.found.get();
  for (int64_t b = from; b < to; ++b) {
    part.to = b;
    const int64_t count = mask_row(team, call, b, row, [&](int64_t j, int64_t i, int64_t id) {
      found[j] = {int32_t(i), int32_t(id)};
    });
    if (count < 0) {
      part.outside = b * call.width - 1 - count;
      return;
    }
    counts[b] = int32_t(count);
    found += count;
  }
  part.to = to;
}

TBF_VARIANTS(mask_rows,
             (const MlmMask& call, int64_t from, int64_t to, int32_t* counts, Part& part),
             (call, from, to, counts, part))

}  // namespace

int64_t mlm_mask_cpu(const MlmMask& call, const MaskedRows& rows, bool allow_empty, int threads) {
  std::vector<Part> parts(size_t(std::max(threads, 1)));
  int32_t* const counts = rows.offsets + 1;
  parallel_rows(call.batch, threads, [&](int64_t from, int64_t to, int n) {
    TBF_BEST(mask_rows)(call, from, to, counts, parts[size_t(n)]);
  });
  // use(flat place, id) of every chosen token, in order.
  auto for_each_found = [&](const auto& use) {
    for (const Part& part : parts) {
      const Found* found = part.found.get();
      for (int64_t b = part.from; b < part.to; ++b) {
        for (int32_t j = 0; j < counts[b]; ++j, ++found) use(b * call.width + found->i, found->id);
      }
    }
  };
  auto refuse = [&](const std::string& why) {
    for_each_found([&](int64_t place, int64_t id) { call.ids[place] = id; });
    throw std::invalid_argument("mlm_mask: " + why);
  };
  for (const Part& part : parts) {
    if (part.outside < 0) continue;
    const int64_t b = part.outside / call.width, i = part.outside % call.width;
    refuse("input_ids[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
           std::to_string(call.ids[part.outside]) + "; expected 0 to " +
           std::to_string(call.vocabulary - 1) + ", the vocabulary");
  }
  const int64_t total = std::accumulate(counts, counts + call.batch, int64_t{0});
  if (total > rows.capacity) {
    refuse(std::to_string(total) + " tokens are masked and capacity is " +
           std::to_string(rows.capacity));
  }
  const int64_t empty = std::find(counts, counts + call.batch, 0) - counts;
  if (empty < call.batch && !allow_empty) {
    refuse("row " + std::to_string(empty) +
           " has no token that may be masked; leave the row out, or give allow_empty_rows=True to "
           "keep it as it is");
  }
  int64_t r = 0;
  for_each_found([&](int64_t place, int64_t id) {
    rows.places[r] = place;
    rows.labels[r++] = id;
  });
  rows.offsets[0] = 0;
  for (int64_t b = 0; b < call.batch; ++b) counts[b] += rows.offsets[b];
  std::fill(rows.places + r, rows.places + rows.capacity, 0);
  std::fill(rows.labels + r, rows.labels + rows.capacity, -100);
  return total;
}

}  // namespace tbf
