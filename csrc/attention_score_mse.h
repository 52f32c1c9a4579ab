// TinyBERT's attention loss and its gradients on the CPU, for packed sequences; one (sequence, head)
// at a time. With X = [a Q, -b P], Y = [K, R], a = D^-0.5, b = Dt^-0.5, E = X Y^T the errors of the
// scores, and w = 1 / (H * pairs):
//
//     loss = w |E|^2,  dQ = 2 w a E K,  dK = 2 w E^T (a Q)
//
//     direct   E as it stands, one tile of queries and one block of keys          O(n^2 D)
//     gram     |E|^2 = <X^T X, Y^T Y>,  E K = X (Y^T K),  E^T (a Q) = Y (X^T (a Q))   O(n D^2)
//
// All sums are fp32, those of the loss fp64 beyond a tile. E and the Gram matrices of bf16 operands
// are products of pairs where the CPU has them (AVX-512 BF16); what is multiplied by a sum is fp32
// everywhere. The sums of a (sequence, head) are added in order, so the number of threads changes
// no bit.
#pragma once

#include <cstdint>

#include "heads.h"

namespace tbf {

struct AttentionScoreMse {
  Heads q, k, p, r;  // student (T, H, D), teacher (T, H, Dt)
  const int32_t* cu_seqlens;  // (sequences + 1,)
  int64_t sequences, heads, width, teacher_width;
  bool bf16;            // else fp32, as are all operands
  bool student;         // without the teacher's own term in the loss
  int64_t direct_up_to;  // tokens of a sequence; longer ones take the Gram form
  bool gradients;        // else the loss alone
};

// loss is one number; dq and dk (T, H, D), of the operands' dtype, are contiguous.
void attention_score_mse_cpu(const AttentionScoreMse& call, float* loss, void* dq, void* dk,
                             int threads);

}  // namespace tbf
