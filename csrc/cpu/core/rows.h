// Rows of numbers in any dtype and stride, converted for the loops. Everything here is `static`: each
// instruction set compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace hetero::cpu {

enum class DType : int { kFloat, kBFloat16, kHalf, kDouble };

static inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

static inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t wide = magnitude << 13;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  x *= 0x1p112f;  // rebiases the exponent, subnormals included
  uint32_t out;
  std::memcpy(&out, &x, sizeof(out));
  out = magnitude >= 0x7c00u ? (wide | 0x7f800000u) : out;
  out |= static_cast<uint32_t>(bits & 0x8000u) << 16;
  std::memcpy(&x, &out, sizeof(x));
  return x;
}

static inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40u);
}

static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t out;
  if (magnitude >= 0x7f800000u) {  // infinity, NaN
    out = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    out = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the result in the last bits
    float y;
    std::memcpy(&y, &magnitude, sizeof(y));
    y += 0.5f;
    std::memcpy(&out, &y, sizeof(out));
    out -= 0x3f000000u;
  } else {
    out = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | out);
}

static constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

static inline int element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Bits of |x|, in the order of the magnitudes; infinity and NaN come after every finite number.
static inline int32_t magnitude_bits(float x) { return __builtin_bit_cast(int32_t, x) & 0x7fffffff; }
static inline int64_t magnitude_bits(double x) { return __builtin_bit_cast(int64_t, x) & 0x7fffffffffffffff; }
template <class Real>
using MagnitudeBits = decltype(magnitude_bits(Real()));

template <class Stored, class Real, class Convert>
static inline void convert_row(const void* row, int64_t stride, int n, Real scale, Real* __restrict__ out,
                               MagnitudeBits<Real>& largest, Convert convert) {
  const Stored* in = static_cast<const Stored*>(row);
  MagnitudeBits<Real> most = largest;
  const auto take = [&](int i, Stored stored) {
    const Real x = convert(stored);
    const MagnitudeBits<Real> bits = magnitude_bits(x);
    most = bits > most ? bits : most;
    out[i] = x * scale;
  };
  if (stride == 1) {
    for (int i = 0; i < n; ++i) take(i, in[i]);
  } else {
    for (int i = 0; i < n; ++i) take(i, in[i * stride]);
  }
  largest = most;
}

// n logits from element `offset` on, `stride` elements apart, as `change` makes them, times `scale`; `largest` takes in their
// magnitudes.
template <class Real, class Change>
static inline void load_changed(const void* logits, DType dtype, int64_t offset, int64_t stride, int n, Real scale, Real* out,
                                MagnitudeBits<Real>& largest, Change change) {
  const void* row = static_cast<const char*>(logits) + offset * element_size(dtype);
  switch (dtype) {
    case DType::kFloat:
      convert_row<float>(row, stride, n, scale, out, largest, [=](float x) { return change(static_cast<Real>(x)); });
      break;
    case DType::kBFloat16:
      convert_row<uint16_t>(row, stride, n, scale, out, largest, [=](uint16_t x) { return change(Real(bfloat16_to_float(x))); });
      break;
    case DType::kHalf:
      convert_row<uint16_t>(row, stride, n, scale, out, largest, [=](uint16_t x) { return change(Real(half_to_float(x))); });
      break;
    case DType::kDouble:
      convert_row<double>(row, stride, n, scale, out, largest, [=](double x) { return change(static_cast<Real>(x)); });
      break;
  }
}

template <class Real>
static inline void load_logits(const void* logits, DType dtype, int64_t offset, int64_t stride, int n, Real scale, Real* out,
                               MagnitudeBits<Real>& largest) {
  load_changed<Real>(logits, dtype, offset, stride, n, scale, out, largest, [](Real x) { return x; });
}

}  // namespace hetero::cpu
