// Attention of one (sequence, head), forward and backward: the body of attention.cpp, included by
// each_isa.h. Queries lie along the lanes of scores (keys, kQueries), so no sum crosses a vector.

#include "tiles.h"

// 64-bit products of the low words of x, whatever the high words are, and y. One instruction on
// x86, which GCC does not find in the general form.
inline Longs low_product(Longs x, uint32_t y) {
#if defined(__SSE2__) && TBF_LANES == 16
  return Longs(_mm512_maskz_mul_epu32(0xFF, __m512i(x), _mm512_set1_epi64(int64_t(y))));
#elif defined(__SSE2__) && TBF_LANES == 8
  return Longs(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(int64_t(y))));
#elif defined(__SSE2__)
  return Longs(_mm_mul_epu32(__m128i(x), _mm_set1_epi64x(int64_t(y))));
#else
  return (x & 0xFFFFFFFF) * uint64_t(y);
#endif
}

// philox.h for a call in each 64-bit lane of kVectors vectors; the words' high halves mean nothing.
template <int kVectors>
inline void philox(Key key, Longs (&c0)[kVectors], Longs (&c1)[kVectors], Longs (&c2)[kVectors],
                   Longs (&c3)[kVectors]) {
  TBF_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    TBF_UNROLL
    for (int n = 0; n < kVectors; ++n) {
      const Longs first = low_product(c0[n], kMultiplier0);
      const Longs second = low_product(c2[n], kMultiplier1);
      c0[n] = second >> 32 ^ c1[n] ^ uint64_t(key.k0);
      c1[n] = second;
      c2[n] = first >> 32 ^ c3[n] ^ uint64_t(key.k1);
      c3[n] = first;
    }
    key.k0 += kWeyl0;
    key.k1 += kWeyl1;
  }
}

// The random bytes of 2 bands of 16 queries and a tile of kDrawn keys, a word for two neighbouring
// keys: words (2, kDrawn / 2, 16 queries), with the byte of the first key in bits 0 to 7 and that
// of the second in bits 16 to 23. The 16 bytes of a call are those of queries i and i + 8; 8 of
// them and 4 groups of keys make a band's 32 calls.
inline void draw(const Key& key, const Pair& at, int64_t query, int64_t first_key,
                 uint32_t* words) {
  constexpr int kCalls = 32, kOfVector = kWide / 2, kVectors = TBF_LANES == 16 ? 4 : 2;
  Longs order{};
  for (int lane = 0; lane < kOfVector; ++lane) order[lane] = uint64_t(lane);
  for (int64_t band = 0; band < kQueries / 16; ++band) {
    uint64_t drawn[4][kCalls];
    for (int call = 0; call < kCalls; call += kVectors * kOfVector) {
      Longs c[4][kVectors];
      for (int n = 0; n < kVectors; ++n) {
        const int first = call + n * kOfVector;
        c[0][n] = Longs{} + uint64_t(first_key / 8 + first / 8);
        c[1][n] = order + uint64_t(query / 2 + band * 8 + first % 8);
        c[2][n] = Longs{} + uint64_t(at.head);
        c[3][n] = Longs{} + uint64_t(at.sequence);
      }
      philox(key, c[0], c[1], c[2], c[3]);
      for (int word = 0; word < 4; ++word) std::memcpy(drawn[word] + call, c[word], sizeof c[word]);
    }
    for (int64_t word = 0; word < 4; ++word) {
      for (int64_t group = 0; group < 4; ++group) {
        uint32_t* const out = words + (band * (kDrawn / 2) + 4 * word + group) * 16;
        for (int i = 0; i < 8; ++i) {
          out[i] = uint32_t(drawn[word][group * 8 + i]);
          out[i + 8] = out[i] >> 8;
        }
      }
    }
  }
}

// Of the words of one tile, those of keys j and j + 1 and vector n of the queries.
inline Uints words_of(const uint32_t* words, int64_t j, int n) {
  const int64_t lane = n * kWide;
  return load_as<Uints>(words + ((lane / 16) * (kDrawn / 2) + j / 2) * 16 + lane % 16);
}

// 0 where a cell is dropped, else x. second: of the two keys of a word.
template <int second>
inline Floats kept(Floats x, Uints words, uint32_t threshold) {
  return words << (second ? 8 : 24) < threshold << 24 ? Floats{} : x;
}

// scores of `keys` keys: -infinity where the direction forbids the pair.
inline void forbid(int direction, int64_t first, int64_t first_key, int64_t keys, float* scores) {
  Ints order{};
  for (int lane = 0; lane < kWide; ++lane) order[lane] = lane;
  for (int64_t j = 0; j < keys; ++j) {
    for (int n = 0; n < kParts; ++n) {
      float* const own = scores + j * kQueries + n * kWide;
      const Ints ahead = order + int32_t(first + n * kWide - (first_key + j));  // query - key
      const Floats x = load(own), never = all(-kInfinity);
      store(own, direction == kCausal ? (ahead < 0 ? never : x) : (ahead > 0 ? never : x));
    }
  }
}

// Which keys some query of a tile may see, and whether they all see all of a block.
struct Seen {
  int direction;
  int64_t first, begin, end;
  bool whole(int64_t key, int64_t keys) const {
    return direction == kBoth || (direction == kCausal ? key + keys <= first + 1
                                                       : key >= first + kQueries - 1);
  }
};

inline Seen seen(int direction, int64_t first, int64_t length) {
  const int64_t end = first + kQueries < length ? first + kQueries : length;
  return {direction, first, direction == kAntiCausal ? first : 0,
          direction == kCausal ? end : length};
}

// Scores of one block -> e^(score - most), dropped cells 0. The largest score and the sum, each
// (kQueries,), go on from block to block; what was summed under a smaller `most`, `sum` and out
// (width, kQueries), is scaled down.
template <bool kDrop>
void softmax(const Attention& call, const Pair& at, const Key& key, int64_t first,
             int64_t first_key, int64_t keys, int64_t width, float* scores, float* most_at,
             float* sum_at, float* out, uint32_t* words) {
  Floats most[kParts], sum[kParts];
  for (int n = 0; n < kParts; ++n) most[n] = load(most_at + n * kWide);
  for (int64_t j = 0; j < keys; ++j) {
    TBF_UNROLL
    for (int n = 0; n < kParts; ++n) {
      most[n] = greater(most[n], load(scores + j * kQueries + n * kWide));
    }
  }
  for (int n = 0; n < kParts; ++n) {
    const Floats shrink = exponential(load(most_at + n * kWide) - most[n]);
    store(most_at + n * kWide, most[n]);
    sum[n] = load(sum_at + n * kWide) * shrink;
    for (int64_t d = 0; d < width; ++d) {
      float* const own = out + d * kQueries + n * kWide;
      store(own, load(own) * shrink);
    }
    if (keys % 2) store(scores + keys * kQueries + n * kWide, all(-kInfinity));
  }
  for (int64_t tile = 0; tile < keys; tile += kDrawn) {
    if (kDrop) draw(key, at, first, first_key + tile, words);
    for (int64_t j = 0; j < kDrawn && tile + j < keys; j += 2) {
      TBF_UNROLL
      for (int n = 0; n < kParts; ++n) {
        float* const own = scores + (tile + j) * kQueries + n * kWide;
        Floats one = exponential(load(own) - most[n]);
        Floats two = exponential(load(own + kQueries) - most[n]);
        sum[n] += one + two;
        if (kDrop) {
          const Uints cells = words_of(words, j, n);
          one = kept<0>(one, cells, uint32_t(call.threshold));
          two = kept<1>(two, cells, uint32_t(call.threshold));
        }
        store(own, one);
        store(own + kQueries, two);
      }
    }
  }
  for (int n = 0; n < kParts; ++n) store(sum_at + n * kWide, sum[n]);
}

template <class Number>
void forward_as(const Attention& call, const Pair& at, const Key& key, const Workspace& w,
                void* out, float* lse) {
  const Sizes& size = w.size;
  const int64_t n = at.length, D = size.width, rows = whole_vectors(n);
  gather<Number>(call.k, at, 0, n, rows, size, 1.0f, w.k_rows);
  transpose(w.k_rows, size.padded, rows, size.padded, w.k_columns, w.stride);
  gather<Number>(call.v, at, 0, n, rows, size, 1.0f, w.v_rows);
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = n - first < kQueries ? n - first : kQueries;
    gather<Number>(call.q, at, first, count, kQueries, size, call.scale, w.q_rows);
    transpose(w.q_rows, size.padded, kQueries, size.padded, w.q_columns, kQueries);
    const Seen keys = seen(call.direction, first, n);
    float most[kQueries], sum[kQueries] = {};
    for (float& x : most) x = -kLargest;
    std::memset(w.out_columns, 0, size_t((size.padded + kSpare) * kQueries) * sizeof(float));
    for (int64_t block = keys.begin; block < keys.end; block += kKeys) {
      const int64_t some = keys.end - block < kKeys ? keys.end - block : kKeys;
      product<1>(some, kQueries, w.k_columns + block, w.stride, w.q_columns, kQueries, D, w.scores,
                 kQueries, false);
      if (!keys.whole(block, some)) forbid(call.direction, first, block, some, w.scores);
      const auto step = call.threshold > 0 ? softmax<true> : softmax<false>;
      step(call, at, key, first, block, some, D, w.scores, most, sum, w.out_columns, w.words);
      product<1>(D, kQueries, w.v_rows + block * size.padded, size.padded, w.scores, kQueries, some,
                 w.out_columns, kQueries, true);
    }
    for (int part = 0; part < kParts; ++part) {
      const Floats total = load(sum + part * kWide);
      const Floats factor = total == 0.0f ? Floats{} : w.keep_scale / total;
      for (int64_t d = 0; d < D; ++d) {
        float* const own = w.out_columns + d * kQueries + part * kWide;
        store(own, load(own) * factor);
      }
    }
    transpose(w.out_columns, kQueries, size.padded, kQueries, w.q_rows, size.padded);
    scatter<Number>(w.q_rows, at, first, count, size, 1.0f, out);
    for (int64_t i = 0; i < count; ++i) {
      lse[(at.first + first + i) * size.heads + at.head] = most[i] + std::log(sum[i]);
    }
  }
}

// scores -> P * keep, grads dP -> dS, of one block; and zeros in the spare rows behind them.
template <bool kDrop>
void softmax_gradient(const Attention& call, const Pair& at, const Key& key, int64_t first,
                      int64_t first_key, int64_t keys, const float* lse, const float* delta,
                      float* scores, float* grads, uint32_t* words) {
  Floats log_sum[kParts], mean[kParts];
  for (int n = 0; n < kParts; ++n) {
    log_sum[n] = load(lse + n * kWide);
    mean[n] = load(delta + n * kWide);
  }
  for (int64_t tile = 0; tile < keys; tile += kDrawn) {
    if (kDrop) draw(key, at, first, first_key + tile, words);
    for (int64_t j = 0; j < kDrawn && tile + j < keys; j += 2) {  // of an odd number one too many
      TBF_UNROLL
      for (int n = 0; n < kParts; ++n) {
        const int64_t own = (tile + j) * kQueries + n * kWide, next = own + kQueries;
        Floats one = exponential(load(scores + own) - log_sum[n]);
        Floats two = exponential(load(scores + next) - log_sum[n]);
        Floats d_one = load(grads + own), d_two = load(grads + next);
        const Floats p_one = one, p_two = two;
        if (kDrop) {
          const Uints cells = words_of(words, j, n);
          const uint32_t threshold = uint32_t(call.threshold);
          one = kept<0>(one, cells, threshold);
          two = kept<1>(two, cells, threshold);
          d_one = kept<0>(d_one, cells, threshold);
          d_two = kept<1>(d_two, cells, threshold);
        }
        store(scores + own, one);
        store(scores + next, two);
        store(grads + own, p_one * (d_one - mean[n]));
        store(grads + next, p_two * (d_two - mean[n]));
      }
    }
  }
  std::memset(scores + keys * kQueries, 0, kSpare * kQueries * sizeof(float));
  std::memset(grads + keys * kQueries, 0, kSpare * kQueries * sizeof(float));
}

template <class Number>
void backward_as(const Attention& call, const Pair& at, const Key& key, const Workspace& w,
                 const Heads& grad, const Heads& out, const float* lse, void* dq, void* dk,
                 void* dv) {
  const Sizes& size = w.size;
  const int64_t n = at.length, D = size.width, C = size.padded, rows = whole_vectors(n);
  gather<Number>(call.v, at, 0, n, rows, size, 1.0f, w.k_rows);
  transpose(w.k_rows, C, rows, C, w.v_columns, w.stride);
  gather<Number>(call.k, at, 0, n, rows, size, 1.0f, w.k_rows);
  transpose(w.k_rows, C, rows, C, w.k_columns, w.stride);
  std::memset(w.dk, 0, size_t((n + kSpare) * C) * sizeof(float));
  std::memset(w.dv, 0, size_t((n + kSpare) * C) * sizeof(float));
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = n - first < kQueries ? n - first : kQueries;
    float log_sum[kQueries] = {}, delta[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      log_sum[i] = lse[(at.first + first + i) * size.heads + at.head];
    }
    gather<Number>(out, at, first, count, kQueries, size, 1.0f, w.q_rows);
    transpose(w.q_rows, C, kQueries, C, w.out_columns, kQueries);
    gather<Number>(grad, at, first, count, kQueries, size, w.keep_scale, w.do_rows);
    transpose(w.do_rows, C, kQueries, C, w.do_columns, kQueries);
    for (int part = 0; part < kParts; ++part) {
      Floats total{};
      for (int64_t d = 0; d < D; ++d) {
        const int64_t own = d * kQueries + part * kWide;
        total += load(w.out_columns + own) * load(w.do_columns + own);
      }
      store(delta + part * kWide, total * (1.0f / w.keep_scale));
    }
    gather<Number>(call.q, at, first, count, kQueries, size, call.scale, w.q_rows);
    transpose(w.q_rows, C, kQueries, C, w.q_columns, kQueries);
    float* const dq_columns = w.out_columns;
    const Seen keys = seen(call.direction, first, n);
    for (int64_t block = keys.begin; block < keys.end; block += kKeys) {
      const int64_t some = keys.end - block < kKeys ? keys.end - block : kKeys;
      product<1>(some, kQueries, w.k_columns + block, w.stride, w.q_columns, kQueries, D, w.scores,
                 kQueries, false);
      product<1>(some, kQueries, w.v_columns + block, w.stride, w.do_columns, kQueries, D, w.grads,
                 kQueries, false);
      if (!keys.whole(block, some)) forbid(call.direction, first, block, some, w.scores);
      const auto step = call.threshold > 0 ? softmax_gradient<true> : softmax_gradient<false>;
      step(call, at, key, first, block, some, log_sum, delta, w.scores, w.grads, w.words);
      product<kQueries>(some, C, w.scores, 1, w.do_rows, C, kQueries, w.dv + block * C, C, true);
      product<kQueries>(some, C, w.grads, 1, w.q_rows, C, kQueries, w.dk + block * C, C, true);
      product<1>(D, kQueries, w.k_rows + block * C, C, w.grads, kQueries, some, dq_columns,
                 kQueries, block > keys.begin);
    }
    transpose(dq_columns, kQueries, C, kQueries, w.do_rows, C);
    scatter<Number>(w.do_rows, at, first, count, size, call.scale, dq);
  }
  scatter<Number>(w.dk, at, 0, n, size, 1.0f, dk);
  scatter<Number>(w.dv, at, 0, n, size, 1.0f, dv);
}

void forward(const Attention& call, const Pair& at, const Key& key, const Workspace& w, void* out,
             float* lse) {
  const auto body = call.bf16 ? forward_as<BFloat16> : forward_as<float>;
  body(call, at, key, w, out, lse);
}

void backward(const Attention& call, const Pair& at, const Key& key, const Workspace& w,
              const Heads& grad, const Heads& out, const float* lse, void* dq, void* dk,
              void* dv) {
  const auto body = call.bf16 ? backward_as<BFloat16> : backward_as<float>;
  body(call, at, key, w, grad, out, lse, dq, dk, dv);
}

void exponentials(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kWide) {
    float edge[kWide] = {};
    const size_t bytes = size_t(count - i < kWide ? count - i : kWide) * sizeof(float);
    std::memcpy(edge, x + i, bytes);
    store(edge, exponential(load(edge)));
    std::memcpy(out + i, edge, bytes);
  }
}
