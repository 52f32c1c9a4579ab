// Cross-entropy of rows of logits on the CPU, and its gradient in their place. With x a row of V
// logits and their biases, y its label, u its weight, s the smoothing and p = softmax(x):
//
//     loss = logsumexp(x) - (1 - s) x[y] - s mean(x),   dx = u (p - (1 - s) onehot(y) - s / V)
//
// A row stays in its core's cache from its logits to their gradients: memory is read and written
// once, and a logit takes one exponential. What is added up of a row is fp32 in vectors, of at most
// kRun each, and then fp64; dbias, of the gradients before they are rounded, fp32 in blocks of
// kBlock rows, which are added in order, so the number of threads changes no bit.
#pragma once

#include <cstdint>

namespace tbf {

struct CrossEntropy {
  void* logits;  // (rows, words), `row` numbers from one to the next
  const float* bias;      // (words,), or null
  const int64_t* labels;  // (rows,), 0..words-1
  const float* weights;   // (rows,); of 0: no loss and no gradient, whatever the logits
  int64_t rows, words, row;
  float smoothing;
  bool bf16;       // else fp32: the logits
  bool gradients;  // else the losses alone
};

// losses (rows,) are not multiplied by the weights. dbias (words,) is added to, or null.
void cross_entropy_cpu(const CrossEntropy& call, float* losses, float* dbias, int threads);

}  // namespace tbf
