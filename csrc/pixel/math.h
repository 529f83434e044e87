// exp, log and log1p for any value type V, such as a vector of floats (csrc/cpu/vec.h).
//
// V provides: V::Real, V::Mask, arithmetic and comparison operators, V(scalar), select(mask, a, b), fma(a, b, c),
// round_to_integer(x), scale_by_power(x, n) = x 2^n and split_exponent(u, n) (below); a type of other precision
// specialises the functions instead. Comparisons are ordered so that a NaN passes through every select here: max and
// clamp would swallow it.
#pragma once

#include "macros.h"

namespace hetero::math {

// Polynomials: minimax fits of the relative error, in float: exp 3.3e-9 on |r| <= ln2 / 2, log1p 3.2e-8 on
// [sqrt(1/2) - 1, sqrt(2) - 1].

// e^x for -87 <= x <= 88.
template <class V>
HK_INLINE V exp_bounded(V x) {
  const V n = round_to_integer(x * V(1.44269504088896341f));
  V r = fma(n, V(-0.693145751953125f), x);  // ln2 in two parts: the first product is exact
  r = fma(n, V(-1.42860682030941723e-6f), r);
  V p = V(1.381314237e-3f);
  p = fma(p, r, V(8.369419044e-3f));
  p = fma(p, r, V(4.166845683e-2f));
  p = fma(p, r, V(1.666651479e-1f));
  p = fma(p, r, V(4.999999305e-1f));
  p = fma(p * r, r, r);
  return scale_by_power(p + V(1.f), n);
}

// e^x for x <= 0, about 1e-38 below -87.
template <class V>
HK_INLINE V exp_nonpositive(V x) {
  return exp_bounded(select(x < V(-87.f), V(-87.f), x));
}

// log(u (1 + residual / u)) for normal u > 0.
template <class V>
HK_INLINE V log_with_residual(V u, V residual) {
  V n;
  const V scale = split_exponent(u, n);  // u scale in [sqrt(1/2), sqrt(2)), u = (u scale) 2^n
  const V f = fma(residual, scale, fma(u, scale, V(-1.f)));
  V p = V(8.700359947e-2f);
  p = fma(p, f, V(-1.426747632e-1f));
  p = fma(p, f, V(1.491478702e-1f));
  p = fma(p, f, V(-1.657758601e-1f));
  p = fma(p, f, V(1.996306229e-1f));
  p = fma(p, f, V(-2.500133702e-1f));
  p = fma(p, f, V(3.333391077e-1f));
  const V f2 = f * f;
  V y = fma(p * f, f2, n * V(-2.12194440e-4f));  // ln2 in two parts again
  y = fma(f2, V(-0.5f), y) + f;
  return fma(n, V(0.693359375f), y);
}

template <class V>
HK_INLINE V log(V u) {
  return log_with_residual(u, V(0.f));
}

// log(1 + e) for 0 <= e < 1e37, to full relative precision: what rounding took from 1 + e is put back.
template <class V>
HK_INLINE V log1p(V e) {
  const V u = V(1.f) + e;
  return log_with_residual(u, e - (u - V(1.f)));
}

// log(1 + e^a) for any a.
template <class V>
HK_INLINE V softplus(V a) {
  const V positive = select(a > V(0.f), a, V(0.f));
  const V magnitude = select(a > V(0.f), a, -a);
  return positive + log1p(exp_nonpositive(-magnitude));
}

// sigma(a) for any a.
template <class V>
HK_INLINE V sigmoid(V a) {
  const V e = exp_nonpositive(select(a > V(0.f), -a, a));
  return select(a > V(0.f), V(1.f), e) / (V(1.f) + e);
}

template <class V>
HK_INLINE V maximum(V a, V b) {
  return select(a > b, a, b);
}

}  // namespace hetero::math
