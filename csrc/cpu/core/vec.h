// Values that the per-pixel mathematics runs on: Vec<N>, N floats in compiler vector extensions, and Lane, one double.
//
// Every instruction set has an N of its own, so that each translation unit instantiates its own templates and the linker
// never takes code compiled for one machine on another. pair.h makes values of two vectors.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../pixel/math.h"

namespace hetero {

// The native types, spelled out: GCC takes a vector type of dependent size for its element type in overloads.
template <int N>
struct Native;
#define HK_NATIVE(N)                                                                    \
  template <>                                                                           \
  struct Native<N> {                                                                    \
    typedef float Floats __attribute__((vector_size(4 * N)));                           \
    typedef float Unaligned __attribute__((vector_size(4 * N), aligned(4), may_alias)); \
    typedef int32_t Ints __attribute__((vector_size(4 * N)));                           \
  };
HK_NATIVE(4)
HK_NATIVE(8)
HK_NATIVE(16)
#undef HK_NATIVE

template <int N>
struct LaneMask {  // vec_avx512.h has another
  typename Native<N>::Ints bits;
};

template <int N>
struct Vec {
  using Floats = typename Native<N>::Floats;
  using Ints = typename Native<N>::Ints;
  using Unaligned = typename Native<N>::Unaligned;
  using Real = float;
  using Part = Vec;
  using Mask = LaneMask<N>;
  static constexpr int kLanes = N;

  Floats v;

  Vec() = default;
  HK_INLINE Vec(Floats x) : v(x) {}
  HK_INLINE explicit Vec(float x) : v(x - Floats{}) {}

  static HK_INLINE Vec load(const float* p) { return Floats(*reinterpret_cast<const Unaligned*>(p)); }
  HK_INLINE void store(float* p) const { *reinterpret_cast<Unaligned*>(p) = v; }
  // Past the caches, where there is a way; p is aligned to the vector.
  HK_INLINE void stream(float* p) const {
#if defined(__AVX512F__)
    if constexpr (N == 16) return _mm512_stream_ps(p, v);
#endif
    store(p);
  }
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

template <int N>
HK_INLINE Vec<N> maximum(Vec<N> a, Vec<N> b) {  // b where either is NaN
  return select(a > b, a, b);
}

// a b + c, one rounding where the machine has the instruction (the compiler contracts it).
template <int N>
HK_INLINE Vec<N> fma(Vec<N> a, Vec<N> b, Vec<N> c) {
  return a.v * b.v + c.v;
}

// sum + x, and the sum alone where the mask is set.
template <int N>
HK_INLINE Vec<N> add_unless(typename Vec<N>::Mask mask, Vec<N> sum, Vec<N> x) {
  return sum.v + (mask.bits ? typename Vec<N>::Floats{} : x.v);
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

// Returns 2^-n with u 2^-n in [1, 2).
template <int N>
HK_INLINE Vec<N> split_exponent(Vec<N> u, Vec<N>& n) {
  using Ints = typename Vec<N>::Ints;
  Ints bits;
  std::memcpy(&bits, &u.v, sizeof(bits));
  const Ints exponent = bits & 0x7f800000;
  const Ints scale = 0x7f000000 - exponent;
  n.v = __builtin_convertvector((exponent >> 23) - 127, typename Vec<N>::Floats);
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

// Lane i is lane index[i] of the two vectors one after the other; index[i] in [0, 2 N).
template <int N>
HK_INLINE Vec<N> shuffle(Vec<N> a, Vec<N> b, typename Vec<N>::Ints index) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a.v, b.v, index);
#else
  Vec<N> x;
  for (int i = 0; i < N; ++i) x.v[i] = index[i] < N ? a.v[index[i]] : b.v[index[i] - N];
  return x;
#endif
}

// The last ten bits of a float, used to carry a small number with it through a maximum.
constexpr int kMaxTag = 1024;

template <int N>
HK_INLINE Vec<N> with_tag(Vec<N> x, int32_t tag) {
  typename Vec<N>::Ints bits;
  std::memcpy(&bits, &x.v, sizeof(bits));
  bits = (bits & ~(kMaxTag - 1)) | tag;
  std::memcpy(&x.v, &bits, sizeof(bits));
  return x;
}

template <int N>
HK_INLINE void tags(Vec<N> x, int32_t* out) {
  typename Vec<N>::Ints bits;
  std::memcpy(&bits, &x.v, sizeof(bits));
  bits &= kMaxTag - 1;
  std::memcpy(out, &bits, sizeof(bits));
}

// One double with the same interface: float64 is for checking, not for speed.
struct Lane {
  using Real = double;
  using Part = Lane;
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
  HK_INLINE void stream(double* p) const { store(p); }
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
HK_INLINE Lane maximum(Lane a, Lane b) { return select(a > b, a, b); }
HK_INLINE Lane add_unless(Lane::Mask mask, Lane sum, Lane x) { return mask.bits ? sum : sum + x; }
HK_INLINE Lane fma(Lane a, Lane b, Lane c) { return Lane(a.v * b.v + c.v); }
HK_INLINE Lane permute(Lane table, int32_t) { return table; }

namespace math {
template <>
struct Functions<Lane> {
  static HK_INLINE Lane exp2_bounded(Lane x) { return Lane(std::exp2(x.v)); }
  static HK_INLINE Lane log2_1p(Lane x) { return Lane(std::log1p(x.v) / kLn2); }
};
template <> HK_INLINE Lane exp_nonpositive(Lane x) { return Lane(std::exp(x.v)); }
template <> HK_INLINE Lane log1p(Lane x) { return Lane(std::log1p(x.v)); }
}  // namespace math

// Lanes of int32 labels equal to one class, or that have one.
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

#if defined(__AVX512F__)
#include "vec_avx512.h"
#endif
