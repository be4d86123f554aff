#include "update.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "threads.h"

#define LDFT_INLINE inline __attribute__((always_inline))

namespace ldft {
namespace {

// Elements that a thread takes at a time. Small enough that the last pieces end together.
constexpr std::size_t kPiece = std::size_t{1} << 17;
// Block within a piece: fits into the nearest cache, so that weights are rounded before they leave it.
constexpr std::size_t kBlock = std::size_t{1} << 10;

LDFT_INLINE void update_block(const AdamW& rule, const Partition& all, std::size_t from, std::size_t count) {
  const AdamW r = rule;
  float* __restrict weights = all.weights + from;
  const float* __restrict gradients = all.gradients + from;
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

LDFT_INLINE void update_block(const Lion& rule, const Partition& all, std::size_t from, std::size_t count) {
  const Lion r = rule;
  float* __restrict weights = all.weights + from;
  const float* __restrict gradients = all.gradients + from;
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

LDFT_INLINE void round_block(const float* __restrict from, std::uint16_t* __restrict to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could turn it into an infinity
    to[i] = static_cast<std::uint16_t>(is_nan ? 0x7fc0 : rounded);
  }
}

template <typename Rule>
LDFT_INLINE void update_piece(const Rule& rule, const Partition& all, std::size_t from, std::size_t end) {
  for (; from < end; from += kBlock) {
    const std::size_t count = std::min(kBlock, end - from);
    update_block(rule, all, from, count);
    if (all.rounded != nullptr) round_block(all.weights + from, all.rounded + from, count);
  }
}

// The loops above are plain; the compiler vectorises them for each of these CPUs. The module is built for any CPU of
// its architecture, so the version for this machine is chosen here.
template <typename Rule>
using Piece = void (*)(const Rule&, const Partition&, std::size_t, std::size_t);

template <typename Rule>
void on_any(const Rule& rule, const Partition& all, std::size_t from, std::size_t end) {
  update_piece(rule, all, from, end);
}

#ifdef __x86_64__
template <typename Rule>
__attribute__((target("avx2,fma"))) void on_avx2(const Rule& rule, const Partition& all, std::size_t from,
                                                 std::size_t end) {
  update_piece(rule, all, from, end);
}

template <typename Rule>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void on_avx512(const Rule& rule,
                                                                                      const Partition& all,
                                                                                      std::size_t from,
                                                                                      std::size_t end) {
  update_piece(rule, all, from, end);
}
#endif

template <typename Rule>
Piece<Rule> for_this_cpu() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return on_avx512<Rule>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return on_avx2<Rule>;
#endif
  return on_any<Rule>;
}

template <typename Rule>
void share_out(const Rule& rule, const Partition& all, std::size_t threads) {
  const Piece<Rule> update = for_this_cpu<Rule>();
  std::atomic<std::size_t> next{0};
  const std::size_t useful = std::max<std::size_t>(1, std::min(threads, (all.count + kPiece - 1) / kPiece));
  run_threads(useful, 0, [&](std::size_t) {
    for (std::size_t piece = next.fetch_add(kPiece); piece < all.count; piece = next.fetch_add(kPiece)) {
      update(rule, all, piece, std::min(all.count, piece + kPiece));
    }
  });
}

}  // namespace

void update(const AdamW& rule, const Partition& partition, std::size_t threads) { share_out(rule, partition, threads); }
void update(const Lion& rule, const Partition& partition, std::size_t threads) { share_out(rule, partition, threads); }

}  // namespace ldft
