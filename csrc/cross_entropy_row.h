// Cross-entropy of one row: the body of cross_entropy.cpp, included by each_isa.h.

#include "vectors.h"

// The first `count` numbers of a vector, the rest `other`.
template <class Number>
inline Floats load_some(const Number* at, int64_t count, float other) {
  Number edge[kWide] = {};
  std::memcpy(edge, at, size_t(count) * sizeof(Number));
  Floats x = load(edge);
  for (int64_t lane = count; lane < kWide; ++lane) x[lane] = other;
  return x;
}

template <class Number>
inline void store_some(Number* at, int64_t count, Floats x) {
  Number edge[kWide];
  store(edge, x);
  std::memcpy(at, edge, size_t(count) * sizeof(Number));
}

inline double across(Floats x) {
  double sum = 0.0;
  for (int lane = 0; lane < kWide; ++lane) sum += double(x[lane]);
  return sum;
}

// Of x (count,).
inline double sum_of(const float* x, int64_t count) {
  double sum = 0.0;
  int64_t j = 0;
  while (j + kWide <= count) {
    const int64_t stop = j + kRun < count ? j + kRun : count;
    Floats part = {};
    for (; j + kWide <= stop; j += kWide) part += load(x + j);
    sum += across(part);
  }
  for (; j < count; ++j) sum += double(x[j]);
  return sum;
}

// Logits and their biases -> x (padded,), with -inf behind them. Returns the largest number.
template <class Number>
float take_row(const Number* row, const float* bias, int64_t count, int64_t padded, float* x) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Floats most = all(kNone);
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) {
    Floats y = load(row + j);
    if (bias != nullptr) y += load(bias + j);
    store(x + j, y);
    most = greater(y, most);
  }
  if (j < count) {
    Floats y = load_some(row + j, count - j, kNone);
    if (bias != nullptr) y += load_some(bias + j, count - j, 0.0f);
    store(x + j, y);
    most = greater(y, most);
    j += kWide;
  }
  for (; j < padded; j += kWide) store(x + j, all(kNone));
  float largest = kNone;
  for (int lane = 0; lane < kWide; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

// x (padded,) -> e^(x - largest), and their sum.
inline double exponentials(float* x, int64_t padded, float largest) {
  double total = 0.0;
  for (int64_t run = 0; run < padded; run += kRun) {
    Floats sums[4] = {};
    for (int64_t j = run; j < run + kRun; j += 4 * kWide) {
      TBF_UNROLL
      for (int n = 0; n < 4; ++n) {
        const Floats e = exponential(load(x + j + n * kWide) - largest);
        store(x + j + n * kWide, e);
        sums[n] += e;
      }
    }
    total += across((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

// x * factor - shift -> row (count,), and added to sum (padded,), unless it is null.
template <class Number>
void put_row(const float* x, float factor, float shift, int64_t count, Number* row, float* sum) {
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) {
    const Floats g = load(x + j) * factor - shift;
    if (sum != nullptr) store(sum + j, load(sum + j) + g);
    store(row + j, g);
  }
  if (j == count) return;
  const Floats g = load(x + j) * factor - shift;
  if (sum != nullptr) store(sum + j, load(sum + j) + g);
  store_some(row + j, count - j, g);
}

template <class Number>
float cross_entropy_row_as(const CrossEntropy& call, int64_t i, int64_t padded, float* x,
                           float* sum) {
  Number* const row = static_cast<Number*>(call.logits) + i * call.row;
  const int64_t V = call.words, label = call.labels[i];
  const float u = call.weights[i], s = call.smoothing;
  if (u == 0.0f) {
    if (call.gradients) std::memset(row, 0, size_t(V) * sizeof(Number));
    return 0.0f;
  }
  const float largest = take_row(row, call.bias, V, padded, x);
  const double of_label = double(x[label]), mean = s == 0.0f ? 0.0 : sum_of(x, V) / double(V);
  const double total = exponentials(x, padded, largest);
  if (call.gradients) {
    const float factor = float(double(u) / total), shift = u * s / float(V), hot = u * (1.0f - s);
    put_row(x, factor, shift, V, row, sum);
    if (sum != nullptr) sum[label] -= hot;
    store_some(row + label, 1, all(x[label] * factor - shift - hot));
  }
  const double below = (1.0 - double(s)) * of_label + double(s) * mean;
  return float(std::log(total) + double(largest) - below);
}

// The loss of row i, unweighted; its gradient takes the place of the logits, and is added to sum
// (padded,), unless that is null. x (padded,): scratch.
float cross_entropy_row(const CrossEntropy& call, int64_t i, int64_t padded, float* x,
                        float* sum) {
  const auto body = call.bf16 ? cross_entropy_row_as<BFloat16> : cross_entropy_row_as<float>;
  return body(call, i, padded, x, sum);
}
