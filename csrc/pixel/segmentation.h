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
  SplitSum<V> student;            // anchored at the label; the other three at the teacher's best class
  SplitSum<V> tempered, teacher;
  SplitSum<V> value;              // of v_c = o^t_c - o^s_c (the anchor) and e^{o^t/T} v_c (the others)
  V smoothed = V(0.f);            // sum_c w_c (o^s_y - o^s_c)
};

// Maxima that were subtracted from the logits before the exponentials: zero in the unguarded visit.
template <class V>
struct SegmentationMaxima {
  V student = V(0.f), teacher = V(0.f);
};

// Logits that the sums are measured from; each is looked at only where its comment says.
template <class V>
struct SegmentationReference {
  V label = V(0.f);                                    // o^s_y: label smoothing, guarded visit
  V student_anchor = V(0.f), teacher_anchor = V(0.f);  // o^s_a, o^t_a: guarded visit with a teacher
};

template <int Power, bool Teacher, bool Guarded, class V, class Real>
HK_INLINE SegmentationClass<V> visit(V o_s, V o_t, Chosen<V> label, Chosen<V> anchor, V class_weight, V o_label,
                                     const SegmentationParameters<Real>& p, const SegmentationMaxima<V>& maxima,
                                     SegmentationSums<V>& sums) {
  SegmentationClass<V> kept;
  const V cold = V(Real(1) / p.temperature);
  const V s = Guarded ? o_s - maxima.student : o_s;
  if constexpr (Teacher) {
    const V t = Guarded ? o_t - maxima.teacher : o_t;
    kept.tempered = Guarded ? math::exp_nonpositive(s * cold) : math::exp_bounded(s * cold);
    kept.teacher = Guarded ? math::exp_nonpositive(t * cold) : math::exp_bounded(t * cold);
    anchor.add(sums.tempered, kept.tempered);
    anchor.add(sums.teacher, kept.teacher);
    anchor.add(sums.value, o_t - o_s, kept.teacher * (o_t - o_s));
  }
  if constexpr (Guarded) {
    kept.student = math::exp_nonpositive(s);
  } else if constexpr (Teacher) {
    kept.student = untempered<Power>(kept.tempered, s);
  } else {
    kept.student = math::exp_bounded(s);
  }
  label.add(sums.student, kept.student);
  if (p.smoothing != 0) sums.smoothed = fma(class_weight, o_label - o_s, sums.smoothed);
  return kept;
}

template <class V>
struct SegmentationPixel {
  V task, kd;
  V inverse_student, inverse_tempered, inverse_teacher;
  V labelled_error;   // p_y - 1 and p^s_a - p^t_a, without the cancellation
  V anchor_kd_error;
};

// `label_weight` is the label's class weight.
template <bool Teacher, bool Guarded, class V, class Real>
HK_INLINE SegmentationPixel<V> finish(const SegmentationSums<V>& sums, const SegmentationParameters<Real>& p,
                                      const SegmentationReference<V>& reference, V label_weight,
                                      const SegmentationMaxima<V>& maxima) {
  SegmentationPixel<V> pixel;
  pixel.inverse_student = V(1.f) / sums.student.total();
  pixel.labelled_error = -sums.student.others * pixel.inverse_student;
  const V nll = Guarded ? surprise_guarded(sums.student, maxima.student - reference.label) : surprise(sums.student);
  pixel.task = V(Real(1) - p.smoothing) * label_weight * nll;
  if (p.smoothing != 0) pixel.task = fma(V(p.smoothing_share), fma(V(p.class_weight_sum), nll, sums.smoothed), pixel.task);
  pixel.kd = V(0.f);
  if constexpr (Teacher) {
    const V cold = V(Real(1) / p.temperature), hot = V(p.temperature);
    pixel.inverse_tempered = V(1.f) / sums.tempered.total();
    pixel.inverse_teacher = V(1.f) / sums.teacher.total();
    pixel.anchor_kd_error = sums.teacher.others * pixel.inverse_teacher - sums.tempered.others * pixel.inverse_tempered;
    const V log_ratio =
        Guarded ? surprise_guarded(sums.tempered, (maxima.student - reference.student_anchor) * cold) -
                      surprise_guarded(sums.teacher, (maxima.teacher - reference.teacher_anchor) * cold)
                : surprise(sums.tempered) - surprise(sums.teacher);
    const V differences = sums.value.others - sums.value.anchor * sums.teacher.others;
    pixel.kd = hot * hot * fma(differences * pixel.inverse_teacher, cold, log_ratio);
  }
  return pixel;
}

// d task / d o^s_c.
template <class V, class Real>
HK_INLINE V task_gradient(const SegmentationClass<V>& kept, const SegmentationPixel<V>& pixel, Chosen<V> label,
                          V class_weight, V label_weight, const SegmentationParameters<Real>& p) {
  V probability = kept.student * pixel.inverse_student, error = probability;
  if (!label.none) {
    error = select(label.mask, pixel.labelled_error, probability);
    probability = select(label.mask, V(1.f) + pixel.labelled_error, probability);
  }
  V gradient = V(Real(1) - p.smoothing) * label_weight * error;
  if (p.smoothing != 0) {
    gradient = fma(V(p.smoothing_share), fma(V(p.class_weight_sum), probability, -class_weight), gradient);
  }
  return gradient;
}

// d kd / d o^s_c.
template <class V, class Real>
HK_INLINE V kd_gradient(const SegmentationClass<V>& kept, const SegmentationPixel<V>& pixel, Chosen<V> anchor,
                        const SegmentationParameters<Real>& p) {
  const V error = kept.tempered * pixel.inverse_tempered - kept.teacher * pixel.inverse_teacher;
  return V(p.temperature) * (anchor.none ? error : select(anchor.mask, pixel.anchor_kd_error, error));
}

}  // namespace hetero
