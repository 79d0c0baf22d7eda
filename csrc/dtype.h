// Element types, their way from and to float on host and device, and the one macro that turns a dtype into a template.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VATT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VATT_HOST_DEVICE inline
#endif

namespace vatt {

enum class DType { kUInt8, kInt64, kFloat, kHalf, kBFloat16, kOther };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

VATT_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

VATT_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to the nearest, ties to even, as torch does; without branches, so that loops over it vectorise.
template <typename T>
VATT_HOST_DEVICE T from_float(float x);

template <>
VATT_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
VATT_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

template <>
VATT_HOST_DEVICE Half from_float<Half>(float x) {
  const uint32_t sign = float_bits(x) & 0x80000000u;
  const uint32_t magnitude = float_bits(x) ^ sign;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;              // NaN, or 65520 and more
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>((magnitude >= 0x477ff000u ? overflow : finite) | (sign >> 16))};
}

// Exact.
VATT_HOST_DEVICE float to_float(float x) { return x; }

VATT_HOST_DEVICE float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

VATT_HOST_DEVICE float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t scaled = float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u));  // 2^112: exact
  return bits_float((magnitude < 0x7c00u ? scaled : magnitude << 13 | 0x7f800000u) | (x.bits & 0x8000u) << 16);
}

}  // namespace vatt

// VATT_DISPATCH_FLOAT(dtype, T, { run<T>(...); });  callers check is_float first.
#define VATT_DISPATCH_FLOAT(dtype, T, ...) \
  switch (dtype) {                         \
    case vatt::DType::kHalf: {             \
      using T = vatt::Half;                \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case vatt::DType::kBFloat16: {         \
      using T = vatt::BFloat16;            \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    default: {                             \
      using T = float;                     \
      __VA_ARGS__;                         \
    }                                      \
  }
