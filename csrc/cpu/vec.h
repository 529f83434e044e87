// Values that the per-pixel mathematics runs on: Vec<N>, N floats in compiler vector extensions, and Lane<double>.
//
// Every instruction set has an N of its own, so that each translation unit instantiates its own templates and the linker
// never takes code compiled for one machine on another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../pixel/math.h"

namespace hetero {

// The native types, spelled out: GCC takes a vector type of dependent size for its element type in overloads.
template <int N>
struct Native;
#define HK_NATIVE(N)                                          \
  template <>                                                 \
  struct Native<N> {                                          \
    typedef float Floats __attribute__((vector_size(4 * N))); \
    typedef int32_t Ints __attribute__((vector_size(4 * N))); \
  };
HK_NATIVE(4)
HK_NATIVE(8)
HK_NATIVE(16)
#undef HK_NATIVE

template <int N>
struct Vec {
  using Floats = typename Native<N>::Floats;
  using Ints = typename Native<N>::Ints;
  using Real = float;
  static constexpr int kLanes = N;

  struct Mask {
    Ints bits;
  };

  Floats v;

  Vec() = default;
  HK_INLINE Vec(Floats x) : v(x) {}
  HK_INLINE explicit Vec(float x) : v(x - Floats{}) {}

  static HK_INLINE Vec load(const float* p) {
    Vec x;
    std::memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  HK_INLINE void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
};

template <int N> HK_INLINE Vec<N> operator+(Vec<N> a, Vec<N> b) { return a.v + b.v; }
template <int N> HK_INLINE Vec<N> operator-(Vec<N> a, Vec<N> b) { return a.v - b.v; }
template <int N> HK_INLINE Vec<N> operator*(Vec<N> a, Vec<N> b) { return a.v * b.v; }
template <int N> HK_INLINE Vec<N> operator/(Vec<N> a, Vec<N> b) { return a.v / b.v; }
template <int N> HK_INLINE Vec<N> operator-(Vec<N> a) { return -a.v; }
template <int N> HK_INLINE typename Vec<N>::Mask operator<(Vec<N> a, Vec<N> b) { return {a.v < b.v}; }
template <int N> HK_INLINE typename Vec<N>::Mask operator>(Vec<N> a, Vec<N> b) { return {a.v > b.v}; }
template <int N> HK_INLINE typename Vec<N>::Mask operator==(Vec<N> a, Vec<N> b) { return {a.v == b.v}; }

template <int N>
HK_INLINE Vec<N> select(typename Vec<N>::Mask mask, Vec<N> a, Vec<N> b) {
  return mask.bits ? a.v : b.v;
}

// a b + c, one rounding where the machine has the instruction (the compiler contracts it).
template <int N>
HK_INLINE Vec<N> fma(Vec<N> a, Vec<N> b, Vec<N> c) {
  return a.v * b.v + c.v;
}

template <int N>
HK_INLINE Vec<N> round_to_integer(Vec<N> x) {  // |x| < 2^22
  const Vec<N> magic(12582912.f);
  return (x + magic) - magic;
}

template <int N>
HK_INLINE Vec<N> scale_by_power(Vec<N> x, Vec<N> n) {  // n integral, x 2^n normal; a NaN in x stays
  using Ints = typename Vec<N>::Ints;
  const Ints power = (__builtin_convertvector(n.v, Ints) + 127) << 23;
  typename Vec<N>::Floats factor;
  std::memcpy(&factor, &power, sizeof(factor));
  return x.v * factor;
}

// Returns 2^-n with u 2^-n in [sqrt(1/2), sqrt(2)).
template <int N>
HK_INLINE Vec<N> split_exponent(Vec<N> u, Vec<N>& n) {
  using Ints = typename Vec<N>::Ints;
  Ints bits;
  std::memcpy(&bits, &u.v, sizeof(bits));
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const Ints scale = (127 - exponent) << 23;
  n.v = __builtin_convertvector(exponent, typename Vec<N>::Floats);
  typename Vec<N>::Floats factor;
  std::memcpy(&factor, &scale, sizeof(factor));
  return factor;
}

// table[index[i]] for each lane; index[i] in [0, N).
template <int N>
HK_INLINE Vec<N> permute(Vec<N> table, typename Vec<N>::Ints index) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(table.v, index);
#else
  Vec<N> x;
  for (int i = 0; i < N; ++i) x.v[i] = table.v[index[i]];
  return x;
#endif
}

// One double with the same interface: float64 is for checking, not for speed.
struct Lane {
  using Real = double;
  using Ints = int32_t;
  static constexpr int kLanes = 1;
  struct Mask {
    bool bits;
  };
  double v;
  Lane() = default;
  HK_INLINE explicit Lane(double x) : v(x) {}
  static HK_INLINE Lane load(const double* p) { return Lane(*p); }
  HK_INLINE void store(double* p) const { *p = v; }
};

HK_INLINE Lane operator+(Lane a, Lane b) { return Lane(a.v + b.v); }
HK_INLINE Lane operator-(Lane a, Lane b) { return Lane(a.v - b.v); }
HK_INLINE Lane operator*(Lane a, Lane b) { return Lane(a.v * b.v); }
HK_INLINE Lane operator/(Lane a, Lane b) { return Lane(a.v / b.v); }
HK_INLINE Lane operator-(Lane a) { return Lane(-a.v); }
HK_INLINE Lane::Mask operator<(Lane a, Lane b) { return {a.v < b.v}; }
HK_INLINE Lane::Mask operator>(Lane a, Lane b) { return {a.v > b.v}; }
HK_INLINE Lane::Mask operator==(Lane a, Lane b) { return {a.v == b.v}; }
HK_INLINE Lane select(Lane::Mask mask, Lane a, Lane b) { return mask.bits ? a : b; }
HK_INLINE Lane fma(Lane a, Lane b, Lane c) { return Lane(a.v * b.v + c.v); }
HK_INLINE Lane permute(Lane table, int32_t) { return table; }

namespace math {
template <> HK_INLINE Lane exp_bounded(Lane x) { return Lane(std::exp(x.v)); }
template <> HK_INLINE Lane exp_nonpositive(Lane x) { return Lane(std::exp(x.v)); }
template <> HK_INLINE Lane log(Lane x) { return Lane(std::log(x.v)); }
template <> HK_INLINE Lane log1p(Lane x) { return Lane(std::log1p(x.v)); }
}  // namespace math

// Lanes of int32 labels equal to one class.
template <int N>
HK_INLINE typename Vec<N>::Mask equals(const int32_t* labels, int32_t value, Vec<N>) {
  typename Vec<N>::Ints x;
  std::memcpy(&x, labels, sizeof(x));
  return {x == value};
}
HK_INLINE Lane::Mask equals(const int32_t* labels, int32_t value, Lane) { return {*labels == value}; }

template <int N>
HK_INLINE typename Vec<N>::Mask not_negative(const int32_t* labels, Vec<N>) {
  typename Vec<N>::Ints x;
  std::memcpy(&x, labels, sizeof(x));
  return {x >= 0};
}
HK_INLINE Lane::Mask not_negative(const int32_t* labels, Lane) { return {*labels >= 0}; }

}  // namespace hetero
