// exp and log1p for any value type V, such as a vector of floats (csrc/cpu/core/vec.h).
//
// V provides: V::Real, V::Mask, arithmetic and comparison operators, V(scalar), select(mask, a, b), maximum(a, b) =
// select(a > b, a, b), which is b where either is NaN, add_unless(mask, sum, x) and fma(a, b, c); and for the functions
// below round_to_integer(x), scale_by_power(x, n) = x 2^n and split_exponent(u, n), or functions of its own. Comparisons
// are ordered so that a NaN passes through every select here: max and clamp would swallow it.
#pragma once

#include "macros.h"

namespace hetero::math {

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

// Minimax fits of the relative error: 2^r to 2.0e-9 on |r| <= 1/2, log2(1 + f) to 3.0e-8 on [0, 1].
template <class V>
struct Polynomials {
  static HK_INLINE V exp2_bounded(V x) {
    const V n = round_to_integer(x), r = x - n;
    V p = V(1.535336196e-4f);
    p = fma(p, r, V(1.339887385e-3f));
    p = fma(p, r, V(9.618436918e-3f));
    p = fma(p, r, V(5.550332367e-2f));
    p = fma(p, r, V(2.402264774e-1f));
    p = fma(p, r, V(6.931471825e-1f));
    return scale_by_power(fma(p, r, V(1.f)), n);
  }

  // (1 + e) 2^-n - 1 is formed from e itself, so that nothing is lost in 1 + e.
  static HK_INLINE V log2_1p(V e) {
    V n;
    const V scale = split_exponent(V(1.f) + e, n);  // 2^-n with (1 + e) 2^-n in [1, 2)
    const V f = fma(e, scale, scale - V(1.f));
    V p = V(7.549182046e-3f);
    p = fma(p, f, V(-4.256706312e-2f));
    p = fma(p, f, V(1.128561944e-1f));
    p = fma(p, f, V(-1.971189678e-1f));
    p = fma(p, f, V(2.756414115e-1f));
    p = fma(p, f, V(-3.584084809e-1f));
    p = fma(p, f, V(4.806929529e-1f));
    p = fma(p, f, V(-7.213401794e-1f));
    p = fma(p, f, V(1.442695022f));
    return fma(p, f, n);
  }
};

// The two functions that everything rests on. A type may specialise them.
template <class V>
struct Functions : Polynomials<V> {};

// 2^x for |x| <= 126.
template <class V>
HK_INLINE V exp2_bounded(V x) {
  return Functions<V>::exp2_bounded(x);
}

// e^x for x <= 0, and 0 below -87: what has no mass must not count, however large what it is multiplied by.
template <class V>
HK_INLINE V exp_nonpositive(V power) {
  const V lowest(-87.f), x = maximum(lowest, power);
  const V log2e(1.44269504f), whole = x * log2e;
  const V rest = fma(x, V(1.92596299e-8f), fma(x, log2e, -whole));  // of x log2(e), which is not a float
  const V e = exp2_bounded(whole);
  return select(power < lowest, V(0.f), fma(e, rest * V(0.693147181f), e));
}

// v, and 0 where there is no mass to multiply it by: a class's distance may be infinite, or not a number (-inf - -inf).
template <class V>
HK_INLINE V where_mass(V mass, V v) {
  return select(mass == V(0.f), V(0.f), v);
}

// log2(1 + e) for 0 <= e < 1e37, to full relative precision.
template <class V>
HK_INLINE V log2_1p(V e) {
  return Functions<V>::log2_1p(e);
}

template <class V>
HK_INLINE V log1p(V e) {
  return V(typename V::Real(kLn2)) * log2_1p(e);
}

// log(u) for 1 <= u < 1e37.
template <class V>
HK_INLINE V log_from_one(V u) {
  return log1p(u - V(1.f));
}

// log(1 + e^a) for any a.
template <class V>
HK_INLINE V softplus(V a) {
  return fma(V(typename V::Real(kLn2)), log2_1p(exp_nonpositive(-maximum(-a, a))), maximum(V(0.f), a));
}

// sigma(a) for any a.
template <class V>
HK_INLINE V sigmoid(V a) {
  const V e = exp_nonpositive(select(a > V(0.f), -a, a));
  return select(a > V(0.f), V(1.f), e) / (V(1.f) + e);
}

}  // namespace hetero::math
