#include "update.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formats.h"

#ifdef __x86_64__
#include <emmintrin.h>
#endif

namespace ldft {
namespace {

// Block within a piece: gradients are widened into the nearest cache, and new weights rounded before they leave it.
constexpr std::size_t kBlock = std::size_t{1} << 8;

// Blocks that are asked of memory before they are worked on, on CPUs of Intel: their prefetchers stop at each page of
// 4 KiB and keep too few reads under way for four streams. Measured in GB/s, AdamW, with and without: Xeon with 16
// threads 187 and 165, with 32 threads 225 and 216; EPYC (Zen 4) with 2 threads 71 and 111, so not there.
constexpr std::size_t kAhead = 2;
constexpr std::size_t kLine = 64;  // bytes

bool asks_ahead() {
#ifdef __x86_64__
  static const bool is_intel = __builtin_cpu_is("intel") != 0;
  return is_intel;
#else
  return false;
#endif
}

LDFT_INLINE void ask_for(const void* array, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(array) + i);
}

template <typename Gradient, typename OneRule>
LDFT_INLINE void ask_for_block(const Partition& all, std::size_t from, std::size_t count) {
  ask_for(static_cast<const typename Gradient::Stored*>(all.gradients) + from,
          count * sizeof(typename Gradient::Stored));
  ask_for(all.weights + from, count * sizeof(float));
  ask_for(all.momentum + from, count * sizeof(float));
  if constexpr (std::is_same_v<OneRule, AdamW>) ask_for(all.variance + from, count * sizeof(float));
}

LDFT_INLINE void update_block(const AdamW& rule, const Partition& all, const float* __restrict gradients,
                              std::size_t from, std::size_t count) {
  const AdamW r = rule;
  float* __restrict weights = all.weights + from;
  float* __restrict momentum = all.momentum + from;
  float* __restrict variance = all.variance + from;
  const float new1 = 1 - r.beta1;
  const float new2 = 1 - r.beta2;
  for (std::size_t i = 0; i < count; ++i) {
    const float gradient = gradients[i] * r.gradient_factor;
    const float m = std::fma(gradient, new1, momentum[i] * r.beta1);
    const float v = std::fma(gradient * gradient, new2, variance[i] * r.beta2);
    const float direction = m / std::fma(std::sqrt(v), r.inverse_bias2, r.epsilon);
    const float decayed = std::fma(weights[i], r.decay, weights[i]);
    momentum[i] = m;
    variance[i] = v;
    weights[i] = std::fma(direction, r.step, decayed);
  }
}

LDFT_INLINE void update_block(const Lion& rule, const Partition& all, const float* __restrict gradients,
                              std::size_t from, std::size_t count) {
  const Lion r = rule;
  float* __restrict weights = all.weights + from;
  float* __restrict momentum = all.momentum + from;
  const float new1 = 1 - r.beta1;
  const float new2 = 1 - r.beta2;
  const float kept = 1 - r.rate * r.weight_decay;
  for (std::size_t i = 0; i < count; ++i) {
    const float gradient = gradients[i] * r.gradient_factor;
    const float direction = std::fma(gradient, new1, momentum[i] * r.beta1);
    momentum[i] = std::fma(gradient, new2, momentum[i] * r.beta2);
    weights[i] = std::fma(weights[i], kept, -std::copysign(r.rate, direction));
  }
}

// Copy past the caches: nobody on the CPU reads the weights' copy again, and an ordinary store would first read the
// memory that it overwrites.
LDFT_INLINE void stream_out(void* to, const void* from, std::size_t bytes) {
#ifdef __x86_64__
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const std::size_t head = std::min(bytes, (16 - reinterpret_cast<std::uintptr_t>(target) % 16) % 16);
  std::memcpy(target, source, head);
  std::size_t done = head;
  for (; done + 16 <= bytes; done += 16) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + done), sixteen);
  }
  std::memcpy(target + done, source + done, bytes - done);
#else
  std::memcpy(to, from, bytes);
#endif
}

template <typename Gradient, typename Copy, typename OneRule>
LDFT_INLINE void update_piece(const OneRule& rule, const Partition& all, std::size_t from, std::size_t end) {
  const auto* stored = static_cast<const typename Gradient::Stored*>(all.gradients);
  auto* copy = static_cast<typename Copy::Stored*>(all.copy);
  const bool asks = asks_ahead();
  alignas(64) float gradients[kBlock];
  alignas(64) typename Copy::Stored narrow[kBlock];
  for (; from < end; from += kBlock) {
    const std::size_t count = std::min(kBlock, end - from);
    if (const std::size_t later = from + kAhead * kBlock; asks && later < end) {
      ask_for_block<Gradient, OneRule>(all, later, std::min(kBlock, end - later));
    }
    for (std::size_t i = 0; i < count; ++i) gradients[i] = Gradient::wide(stored[from + i]);
    update_block(rule, all, gradients, from, count);
    if (copy == nullptr) continue;
    const float* __restrict weights = all.weights + from;
    for (std::size_t i = 0; i < count; ++i) narrow[i] = Copy::narrow(weights[i]);
    stream_out(copy + from, narrow, count * sizeof narrow[0]);
  }
#ifdef __x86_64__
  _mm_sfence();  // streaming stores are not ordered before a later flag otherwise
#endif
}

// The loops above are plain; the compiler vectorises them for each of these CPUs. The module is built for any CPU of
// its architecture, so the version for this machine is chosen here.
template <typename OneRule>
using Piece = void (*)(const OneRule&, const Partition&, std::size_t, std::size_t);

template <typename OneRule, typename Gradient, typename Copy>
void on_any(const OneRule& rule, const Partition& all, std::size_t from, std::size_t end) {
  update_piece<Gradient, Copy>(rule, all, from, end);
}

#ifdef __x86_64__
template <typename OneRule, typename Gradient, typename Copy>
__attribute__((target("avx2,fma"))) void on_avx2(const OneRule& rule, const Partition& all, std::size_t from,
                                                 std::size_t end) {
  update_piece<Gradient, Copy>(rule, all, from, end);
}

template <typename OneRule, typename Gradient, typename Copy>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void on_avx512(const OneRule& rule,
                                                                                      const Partition& all,
                                                                                      std::size_t from,
                                                                                      std::size_t end) {
  update_piece<Gradient, Copy>(rule, all, from, end);
}
#endif

template <typename OneRule, typename Gradient, typename Copy>
Piece<OneRule> for_this_cpu() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return on_avx512<OneRule, Gradient, Copy>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return on_avx2<OneRule, Gradient, Copy>;
#endif
  return on_any<OneRule, Gradient, Copy>;
}

template <typename OneRule, typename Gradient>
Piece<OneRule> for_copy(Type copy) {
  if (copy == Type::bf16) return for_this_cpu<OneRule, Gradient, Bf16>();
  if (copy == Type::fp16) return for_this_cpu<OneRule, Gradient, Fp16>();
  return for_this_cpu<OneRule, Gradient, Fp32>();
}

template <typename OneRule>
Piece<OneRule> for_types(Type gradients, Type copy) {
  if (gradients == Type::bf16) return for_copy<OneRule, Bf16>(copy);
  if (gradients == Type::fp16) return for_copy<OneRule, Fp16>(copy);
  return for_copy<OneRule, Fp32>(copy);
}

std::size_t bytes_of(Type type) { return type == Type::fp32 ? 4 : 2; }

}  // namespace

void update(const Rule& rule, const Partition& partition, std::size_t from, std::size_t end) {
  std::visit(
      [&](const auto& one) {
        using OneRule = std::decay_t<decltype(one)>;
        for_types<OneRule>(partition.gradient_type, partition.copy_type)(one, partition, from, end);
      },
      rule);
}

std::size_t traffic(const Rule& rule, const Partition& partition, std::size_t count) {
  const std::size_t states = std::holds_alternative<AdamW>(rule) ? 3 : 2;  // with the weights; read and written
  const std::size_t copy = partition.copy == nullptr ? 0 : bytes_of(partition.copy_type);
  return count * (states * 2 * sizeof(float) + bytes_of(partition.gradient_type) + copy);
}

}  // namespace ldft
