// mlm_mask on the CPU: rows shared out among threads, each with its own scratch.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "entries.h"
#include "isa.h"
#include "mlm_mask.h"
#include "parallel.h"
#include "serial_team.h"

namespace tbf {
namespace {

// The rows of one thread.
struct Part {
  std::vector<std::pair<int64_t, int64_t>> found;  // flat places of chosen tokens, their ids
  int64_t outside = -1;        // flat place of a token outside the vocabulary
};

TBF_HD void mask_rows_body(const MlmMask& arguments, int64_t from, int64_t to, int32_t* counts,
                           Part& part) {
  const MlmMask call = arguments;  // a copy that no store can alias
  const size_t width = size_t(call.width);
  std::vector<uint64_t> keys(2 * (width + Serial::kLane));
  std::vector<uint32_t> weights(width + 1), words(width + 4), buckets(2 * width + 4);
  std::vector<uint8_t> chosen(width);
  RowScratch row{keys.data(), weights.data(), words.data(), chosen.data()};
  Serial team{keys.data() + width + Serial::kLane, buckets.data()};
  for (int64_t b = from; b < to; ++b) {
    const int64_t count = mask_row(team, call, b, row, [&](int64_t, int64_t i, int64_t id) {
      part.found.emplace_back(b * call.width + i, id);
    });
    if (count < 0) {
      part.outside = b * call.width - 1 - count;
      return;
    }
    counts[b] = int32_t(count);
  }
}

TBF_VARIANTS(mask_rows, (const MlmMask& call, int64_t from, int64_t to, int32_t* counts, Part& part),
             (call, from, to, counts, part))

}  // namespace

int64_t mlm_mask_cpu(const MlmMask& call, const MaskedRows& rows, bool allow_empty, int threads) {
  std::vector<Part> parts(size_t(std::max(threads, 1)));
  int32_t* const counts = rows.offsets + 1;
  parallel_rows(call.batch, threads, [&](int64_t from, int64_t to, int n) {
    TBF_BEST(mask_rows)(call, from, to, counts, parts[size_t(n)]);
  });
  auto refuse = [&](const std::string& why) {
    for (const Part& part : parts) {  // nothing is left half done
      for (const auto& [place, id] : part.found) call.ids[place] = id;
    }
    throw std::invalid_argument("mlm_mask: " + why);
  };
  int64_t total = 0;
  for (const Part& part : parts) {
    total += int64_t(part.found.size());
    if (part.outside < 0) continue;
    const int64_t b = part.outside / call.width, i = part.outside % call.width;
    refuse("input_ids[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
           std::to_string(call.ids[part.outside]) + "; expected 0 to " +
           std::to_string(call.vocabulary - 1) + ", the vocabulary");
  }
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
  rows.offsets[0] = 0;
  for (int64_t b = 0; b < call.batch; ++b) counts[b] += rows.offsets[b];
  int64_t r = 0;
  for (const Part& part : parts) {
    for (const auto& [place, id] : part.found) {
      rows.places[r] = place;
      rows.labels[r++] = id;
    }
  }
  std::fill(rows.places + r, rows.places + rows.capacity, 0);
  std::fill(rows.labels + r, rows.labels + rows.capacity, -100);
  return total;
}

}  // namespace tbf
