// Attention on the CPU, forward and backward, for packed sequences; one (sequence, head) at a time.
//
//     O = (P * M) V,  P = softmax(scale * Q K^T),  M = keep / keep_rate,  lse = log sum exp
//     dV = (P * M)^T dO,  dS = P * ((dO V^T) * M - rowsum(dO * O)),  dQ = scale * dS K,
//     dK = scale * dS^T Q
//
// Scores live for one tile of queries and one block of keys, in the first-level cache, and so does
// the dropout, drawn there: the cells of reference/philox.py. All sums are fp32. A (sequence, head)
// belongs to one thread, so the number of threads changes no bit.
#pragma once

#include <cstdint>

#include "dropout_mask.h"
#include "heads.h"

namespace tbf {

enum Direction { kBoth, kCausal, kAntiCausal };

struct Attention {
  Heads q, k, v;
  const int32_t* cu_seqlens;  // (sequences + 1,)
  int64_t sequences, heads, width;
  bool bf16;  // else fp32, as are all operands and results but lse
  float scale;
  int direction;
  DropoutSite site;
  int threshold;  // bytes below it are dropped; 0: no dropout
};

// Results (T, H, D) are contiguous, lse (T, H) fp32.
void attention_forward_cpu(const Attention& call, void* out, float* lse, int threads);
void attention_backward_cpu(const Attention& call, const Heads& grad, const void* out,
                            const float* lse, void* dq, void* dk, void* dv, int threads);

// out = e^x as the softmax computes it. For tests.
void exponential_cpu(const float* x, int64_t count, float* out);

}  // namespace tbf
