// The optimizer's step over weights in host memory, in one pass over each byte.
#pragma once

#include <cstddef>
#include <variant>

namespace ldft {

enum class Type { fp32, bf16, fp16 };

// Arrays of the parts of a parameter that this rank updates. They must not overlap.
struct Partition {
  float* weights;
  const void* gradients;
  Type gradient_type;
  float* momentum;
  float* variance;  // AdamW's only
  void* copy;       // receives the new weights in the precision of the computation; may be null
  Type copy_type;
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

using Rule = std::variant<AdamW, Lion>;

// Elements that a thread takes at a time: small enough that the last pieces end together, and that a waiting thread
// soon goes on.
constexpr std::size_t kPiece = std::size_t{1} << 17;

// Update elements [from, end) of a partition on the calling thread; its writes are visible to other threads as ordinary
// writes are. Roundings are those of DeepSpeed's CPUAdam and CPULion on a CPU with FMA: results are equal bit for bit.
void update(const Rule& rule, const Partition& partition, std::size_t from, std::size_t end);

// Bytes that the update of `count` elements of a partition reads and writes.
std::size_t traffic(const Rule& rule, const Partition& partition, std::size_t count);

}  // namespace ldft
