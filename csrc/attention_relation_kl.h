// MiniLM's relation loss and its gradients on the CPU, for packed sequences; one (sequence, relation
// head) at a time. With S = a A B^T, T = b C D^T, a = D^-0.5, b = Dt^-0.5, their softmaxes by rows
// P and Q, and w = 1 / (R tokens):
//
//     loss = w sum Q (log Q - log P),   E = P - Q,   dA = w a E B,   dB = w a E^T A
//
// A tile of queries meets all keys at once, so its softmaxes are final: two exponentials a score.
// Scores of bf16 operands are products of pairs where the CPU has them (AVX-512 BF16); all else is
// fp32, the logarithms and the loss fp64. The sums of a (sequence, head) are added in order, so the
// number of threads changes no bit.
#pragma once

#include <cstdint>

#include "heads.h"

namespace tbf {

struct AttentionRelationKl {
  Heads a, b, c, d;  // student (T, R, D), teacher (T, R, Dt)
  bool itself;       // b is a, and its gradient is added to a's
  const int32_t* cu_seqlens;  // (sequences + 1,)
  int64_t sequences, tokens, heads, width, teacher_width;
  bool bf16;       // else fp32, as are all operands
  bool gradients;  // else the loss alone
};

// loss is one number; da and db (T, R, D), fp32, are contiguous. db is not written of a relation
// with itself.
void attention_relation_kl_cpu(const AttentionRelationKl& call, float* loss, float* da, float* db,
                               int threads);

}  // namespace tbf
