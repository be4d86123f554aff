// The optimizer's step over weights in host memory, in one pass over each byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ldft {

// fp32 arrays of one partition, and the destination of its weights rounded to bf16 (nearest, ties to even), or null.
// They must not overlap.
struct Partition {
  float* weights;
  const float* gradients;
  float* momentum;
  float* variance;  // AdamW's only
  std::uint16_t* rounded;
  std::size_t count;
};

// AdamW's parameters, the same for every element. Each gradient g is first multiplied by gradient_factor (unscaling and
// clipping).
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   w = w + decay w + step m / (inverse_bias2 sqrt(v) + epsilon)
// with decay = -rate * weight decay, step = -rate / (1 - beta1^t) and inverse_bias2 = 1 / sqrt(1 - beta2^t).
struct AdamW {
  float gradient_factor, beta1, beta2, epsilon, inverse_bias2, step, decay;
};

//   w = (1 - rate * weight decay) w - rate sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g
// where the sign of zero is not 0, as in CPULion: a weight without gradient and momentum still moves by the rate.
struct Lion {
  float gradient_factor, beta1, beta2, rate, weight_decay;
};

// Update a whole partition with up to `threads` threads, including the caller. Roundings are those of
// DeepSpeed's CPUAdam and CPULion on a CPU with FMA: results are equal bit for bit.
void update(const AdamW& rule, const Partition& partition, std::size_t threads);
void update(const Lion& rule, const Partition& partition, std::size_t threads);

}  // namespace ldft
