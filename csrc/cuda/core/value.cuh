// The value that the per-pixel mathematics runs on in CUDA: one float, with the hardware's 2^x and 1 / x.
#pragma once

#include <cmath>

#include "../../pixel/math.h"
#include "device.cuh"

namespace hetero::cuda {

// The hardware's approximations, which take subnormal numbers for 0 and make 0 of them. The host's do so, too, and are as far
// off as PTX allows the hardware's to be, so that accuracy shown on the host holds on a GPU.
namespace approximate {

#if defined(__CUDA_ARCH__)
HK_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HK_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
// A relative error of up to 2^-bits, another for every x.
inline float blurred(double exact, float x, int bits) {
  const uint32_t hash = __builtin_bit_cast(uint32_t, x) * 2654435761u;
  return static_cast<float>(exact * (1.0 + (hash / 2147483648.0 - 1.0) * std::ldexp(1.0, -bits)));
}
inline float flushed(float x) { return ::fabsf(x) < 0x1p-126f ? ::copysignf(0.f, x) : x; }
inline float exp2(float x) {
  return flushed(x) == 0.f ? 1.f : flushed(blurred(::exp2f(x), x, 22));  // PTX promises 2^0 = 1
}
inline float reciprocal(float x) { return flushed(blurred(1.0 / flushed(x), x, 23)); }
#endif

}  // namespace approximate

struct Value {
  using Real = float;
  using Mask = bool;
  float v;
  Value() = default;
  HK_INLINE explicit Value(float x) : v(x) {}
};

HK_INLINE Value operator+(Value a, Value b) { return Value(a.v + b.v); }
HK_INLINE Value operator-(Value a, Value b) { return Value(a.v - b.v); }
HK_INLINE Value operator*(Value a, Value b) { return Value(a.v * b.v); }
HK_INLINE Value operator-(Value a) { return Value(-a.v); }
HK_INLINE bool operator<(Value a, Value b) { return a.v < b.v; }
HK_INLINE bool operator>(Value a, Value b) { return a.v > b.v; }
HK_INLINE bool operator==(Value a, Value b) { return a.v == b.v; }
HK_INLINE Value select(bool mask, Value a, Value b) { return mask ? a : b; }
HK_INLINE Value maximum(Value a, Value b) { return a.v > b.v ? a : b; }
HK_INLINE Value add_unless(bool mask, Value sum, Value x) { return mask ? sum : Value(sum.v + x.v); }
HK_INLINE Value fma(Value a, Value b, Value c) { return Value(::fmaf(a.v, b.v, c.v)); }
HK_INLINE Value operator/(Value a, Value b) { return Value(a.v * approximate::reciprocal(b.v)); }

// Returns 2^-n with u 2^-n in [1, 2).
HK_INLINE Value split_exponent(Value u, Value& n) {
  const uint32_t exponent = __builtin_bit_cast(uint32_t, u.v) & 0x7f800000u;
  // The exponent as a float by way of a mantissa: a conversion would take a slot of the special function unit.
  n.v = __builtin_bit_cast(float, (exponent >> 23) | 0x4b000000u) - 8388735.f;
  return Value(__builtin_bit_cast(float, 0x7f000000u - exponent));
}

}  // namespace hetero::cuda

namespace hetero::math {

template <>
struct Functions<cuda::Value> : Polynomials<cuda::Value> {
  static HK_INLINE cuda::Value exp2_bounded(cuda::Value x) { return cuda::Value(cuda::approximate::exp2(x.v)); }
};

}  // namespace hetero::math
