// What a raw logit z means, y = scale z + shift of its class and ReLU of that, and the gradient by it as that by z, scale and
// shift.
#pragma once

#include "macros.h"

namespace hetero {

template <class Real>
HK_INLINE Real normalized(Real z, Real scale, Real shift, bool relu) {
  const Real y = scale * z + shift;
  return relu && y <= 0 ? Real(0) : y;  // NaN passes
}

// Of one class, logit by logit; V as math.h has it.
template <class V>
struct NormalizationGradient {
  V scale, shift;
  bool relu;
  V by_scale, by_shift;  // sums

  HK_INLINE NormalizationGradient(V scale_of_class, V shift_of_class, bool with_relu)
      : scale(scale_of_class), shift(shift_of_class), relu(with_relu), by_scale(V(0)), by_shift(V(0)) {}

  // The gradient by z of the one by what z means: 0 where that is 0, whatever z is.
  HK_INLINE V take(V z, V gradient) {
    const V zero(0), y = fma(scale, z, shift);
    if (relu) gradient = select(y > zero, gradient, select(y == y, zero, gradient));  // NaN passes
    by_scale = by_scale + select(gradient == zero, zero, gradient * z);
    by_shift = by_shift + gradient;
    return select(gradient == zero, zero, scale * gradient);
  }
};

}  // namespace hetero
