// Conversions between fp32 and 16-bit formats, one element at a time, as plain integer and float operations that
// compilers turn into vector code. Results are those of the hardware's instructions, for subnormal numbers too.
#pragma once

#include <cstdint>
#include <cstring>

#define LDFT_INLINE inline __attribute__((always_inline))

namespace ldft {

LDFT_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LDFT_INLINE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A format's `wide` is exact, its `narrow` rounds to nearest, ties to even. A NaN stays a NaN.
struct Fp32 {
  using Stored = float;
  static LDFT_INLINE float wide(float stored) { return stored; }
  static LDFT_INLINE float narrow(float value) { return value; }
};

struct Bf16 {
  using Stored = std::uint16_t;
  static LDFT_INLINE float wide(std::uint16_t stored) { return float_of(static_cast<std::uint32_t>(stored) << 16); }
  static LDFT_INLINE std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could turn it into an infinity
    return static_cast<std::uint16_t>(is_nan ? 0x7fc0 : rounded);
  }
};

struct Fp16 {
  using Stored = std::uint16_t;
  static LDFT_INLINE float wide(std::uint16_t stored) {
    const std::uint32_t sign = static_cast<std::uint32_t>(stored & 0x8000) << 16;
    const std::uint32_t rest = stored & 0x7fff;
    // A subnormal number is a multiple of 2^-24. It is made from an integer, since a thread may treat subnormal floats
    // as zero.
    const std::uint32_t subnormal = bits_of(static_cast<float>(static_cast<std::int32_t>(rest)) * 0x1p-24f);
    const std::uint32_t normal = (rest << 13) + (112u << 23);
    const std::uint32_t special = (rest << 13) + (224u << 23);  // infinities and NaNs
    return float_of(sign | (rest < 0x400 ? subnormal : rest >= 0x7c00 ? special : normal));
  }
  static LDFT_INLINE std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000;
    const std::uint32_t rest = bits & 0x7fffffff;
    // Adding 0.5 leaves multiples of 2^-24, the unit of subnormal numbers: the sum is rounded as wanted.
    const std::uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
    const std::uint32_t normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
    const std::uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    // From 65,520 on, the next multiple is above the largest number.
    return static_cast<std::uint16_t>(sign | (rest < 0x38800000 ? subnormal : rest >= 0x477ff000 ? special : normal));
  }
};

}  // namespace ldft
