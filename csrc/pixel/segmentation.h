// Cross-entropy and logit distillation per pixel (docs/mathematics.md, section 7), for any value type V.
//
// As in hakd.h: one visit of every class, `finish`, then the gradient of every class. `visit` takes logits shifted by
// nothing and is right for |o| <= logit_limit(T); with maxima subtracted beforehand it is right for any logits.
#pragma once

#include "hakd.h"

namespace hetero {

template <class Real>
struct SegmentationParameters {
  Real temperature = 1;
  Real smoothing = 0;          // label smoothing
  Real smoothing_share = 0;    // smoothing / K
  Real class_weight_sum = 0;   // sum of class weights (K without them)
};

template <class V>
struct SegmentationClass {
  V student;   // e^{o^s}
  V tempered;  // e^{o^s / T}
  V teacher;   // e^{o^t / T}
};

template <class V>
struct SegmentationSums {
  SplitSum<V> student;
  V weighted_logits = V(0.f);                                      // label smoothing
  V tempered = V(0.f), teacher = V(0.f), value = V(0.f);           // distillation
};

// Maxima that were subtracted from the logits before the exponentials: zero in the unguarded visit.
template <class V>
struct SegmentationMaxima {
  V student = V(0.f), teacher = V(0.f);
};

template <int Power, bool Teacher, bool Guarded, class V, class Real>
HK_INLINE SegmentationClass<V> visit(V o_s, V o_t, Labelled<V> label, V class_weight,
                                     const SegmentationParameters<Real>& p, const SegmentationMaxima<V>& maxima,
                                     SegmentationSums<V>& sums) {
  SegmentationClass<V> kept;
  const V cold = V(Real(1) / p.temperature);
  const V s = Guarded ? o_s - maxima.student : o_s;
  if constexpr (Teacher) {
    const V t = Guarded ? o_t - maxima.teacher : o_t;
    kept.tempered = Guarded ? math::exp_nonpositive(s * cold) : math::exp_bounded(s * cold);
    kept.teacher = Guarded ? math::exp_nonpositive(t * cold) : math::exp_bounded(t * cold);
    sums.tempered = sums.tempered + kept.tempered;
    sums.teacher = sums.teacher + kept.teacher;
    sums.value = fma(kept.teacher, o_t - o_s, sums.value);
  }
  if constexpr (Guarded) {
    kept.student = math::exp_nonpositive(s);
  } else if constexpr (Teacher) {
    kept.student = untempered<Power>(kept.tempered, s);
  } else {
    kept.student = math::exp_bounded(s);
  }
  label.add(sums.student, kept.student);
  if (p.smoothing != 0) sums.weighted_logits = fma(class_weight, o_s, sums.weighted_logits);
  return kept;
}

template <class V>
struct SegmentationPixel {
  V task, kd;
  V inverse_student, inverse_tempered, inverse_teacher;
  V labelled_error;  // p_y - 1, without the cancellation
};

// `anchor` is the label's logit, `label_weight` its class weight.
template <bool Teacher, bool Guarded, class V, class Real>
HK_INLINE SegmentationPixel<V> finish(const SegmentationSums<V>& sums, const SegmentationParameters<Real>& p, V anchor,
                                      V label_weight, const SegmentationMaxima<V>& maxima) {
  SegmentationPixel<V> pixel;
  pixel.inverse_student = V(1.f) / sums.student.total();
  pixel.labelled_error = -sums.student.others * pixel.inverse_student;
  const V nll = Guarded ? surprise_guarded(sums.student, maxima.student - anchor) : surprise(sums.student);
  pixel.task = V(Real(1) - p.smoothing) * label_weight * nll;
  if (p.smoothing != 0) {
    const V log_total = nll + anchor;
    pixel.task = fma(V(p.smoothing_share), fma(V(p.class_weight_sum), log_total, -sums.weighted_logits), pixel.task);
  }
  pixel.kd = V(0.f);
  if constexpr (Teacher) {
    const V cold = V(Real(1) / p.temperature), hot = V(p.temperature);
    pixel.inverse_tempered = V(1.f) / sums.tempered;
    pixel.inverse_teacher = V(1.f) / sums.teacher;
    V log_ratio = math::log(sums.tempered * pixel.inverse_teacher);
    if constexpr (Guarded) log_ratio = log_ratio + (maxima.student - maxima.teacher) * cold;
    pixel.kd = hot * hot * fma(sums.value * pixel.inverse_teacher, cold, log_ratio);
  }
  return pixel;
}

// d task / d o^s_c.
template <class V, class Real>
HK_INLINE V task_gradient(const SegmentationClass<V>& kept, const SegmentationPixel<V>& pixel, Labelled<V> label,
                          V class_weight, V label_weight, const SegmentationParameters<Real>& p) {
  const V probability = kept.student * pixel.inverse_student;
  const V error = label.none ? probability : select(label.mask, pixel.labelled_error, probability);
  V gradient = V(Real(1) - p.smoothing) * label_weight * error;
  if (p.smoothing != 0) {
    gradient = fma(V(p.smoothing_share), fma(V(p.class_weight_sum), probability, -class_weight), gradient);
  }
  return gradient;
}

// d kd / d o^s_c.
template <class V, class Real>
HK_INLINE V kd_gradient(const SegmentationClass<V>& kept, const SegmentationPixel<V>& pixel,
                        const SegmentationParameters<Real>& p) {
  return V(p.temperature) * (kept.tempered * pixel.inverse_tempered - kept.teacher * pixel.inverse_teacher);
}

}  // namespace hetero
