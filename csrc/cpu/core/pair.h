// Two vectors as one value: every operation is issued for both, so that one's work fills the time the other waits for its
// results. The chain from a logit to its weight is some 200 cycles of latency for some 60 of work.
#pragma once

#include "vec.h"

namespace hetero {

template <class P>
struct Pair {
  using Real = typename P::Real;
  using Part = P;
  static constexpr int kLanes = 2 * P::kLanes;

  struct Mask {
    typename P::Mask a, b;
  };

  P a, b;

  Pair() = default;
  HK_INLINE Pair(P first, P second) : a(first), b(second) {}
  HK_INLINE explicit Pair(Real x) : a(x), b(x) {}

  static HK_INLINE Pair load(const Real* p) { return {P::load(p), P::load(p + P::kLanes)}; }
  HK_INLINE void store(Real* p) const {
    a.store(p);
    b.store(p + P::kLanes);
  }
};

template <class P> HK_INLINE Pair<P> operator+(Pair<P> x, Pair<P> y) { return {x.a + y.a, x.b + y.b}; }
template <class P> HK_INLINE Pair<P> operator-(Pair<P> x, Pair<P> y) { return {x.a - y.a, x.b - y.b}; }
template <class P> HK_INLINE Pair<P> operator*(Pair<P> x, Pair<P> y) { return {x.a * y.a, x.b * y.b}; }
template <class P> HK_INLINE Pair<P> operator/(Pair<P> x, Pair<P> y) { return {x.a / y.a, x.b / y.b}; }
template <class P> HK_INLINE Pair<P> operator-(Pair<P> x) { return {-x.a, -x.b}; }
template <class P> HK_INLINE typename Pair<P>::Mask operator<(Pair<P> x, Pair<P> y) { return {x.a < y.a, x.b < y.b}; }
template <class P> HK_INLINE typename Pair<P>::Mask operator>(Pair<P> x, Pair<P> y) { return {x.a > y.a, x.b > y.b}; }
template <class P> HK_INLINE typename Pair<P>::Mask operator==(Pair<P> x, Pair<P> y) { return {x.a == y.a, x.b == y.b}; }

template <class P>
HK_INLINE Pair<P> select(typename Pair<P>::Mask mask, Pair<P> x, Pair<P> y) {
  return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}

template <class P>
HK_INLINE Pair<P> add_unless(typename Pair<P>::Mask mask, Pair<P> sum, Pair<P> x) {
  return {add_unless(mask.a, sum.a, x.a), add_unless(mask.b, sum.b, x.b)};
}

template <class P>
HK_INLINE Pair<P> fma(Pair<P> x, Pair<P> y, Pair<P> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}

template <class P>
HK_INLINE Pair<P> maximum(Pair<P> x, Pair<P> y) {
  return {maximum(x.a, y.a), maximum(x.b, y.b)};
}

namespace math {
template <class P>
struct Functions<Pair<P>> {
  static HK_INLINE Pair<P> exp2_bounded(Pair<P> x) { return {Functions<P>::exp2_bounded(x.a), Functions<P>::exp2_bounded(x.b)}; }
  static HK_INLINE Pair<P> log2_1p(Pair<P> x) { return {Functions<P>::log2_1p(x.a), Functions<P>::log2_1p(x.b)}; }
};
}  // namespace math

template <class P>
HK_INLINE Pair<P> with_tag(Pair<P> x, int32_t tag) {
  return {with_tag(x.a, tag), with_tag(x.b, tag)};
}

template <class P>
HK_INLINE void tags(Pair<P> x, int32_t* out) {
  tags(x.a, out);
  tags(x.b, out + P::kLanes);
}

template <class P>
HK_INLINE typename Pair<P>::Mask equals(const int32_t* labels, int32_t value, Pair<P>) {
  return {equals(labels, value, P()), equals(labels + P::kLanes, value, P())};
}

template <class P>
HK_INLINE typename Pair<P>::Mask not_negative(const int32_t* labels, Pair<P>) {
  return {not_negative(labels, P()), not_negative(labels + P::kLanes, P())};
}

}  // namespace hetero
