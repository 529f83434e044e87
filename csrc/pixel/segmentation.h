// Cross-entropy and logit distillation per pixel (docs/mathematics.md, section 7), for any value type V.
//
// As in hakd.h: one visit of every class, `finish`, then the gradient of every class. The unguarded `visit` takes logits
// in units of T ln 2 (`to_natural` follows it) and is right for |o| <= logit_limit(T); the guarded one takes natural
// logits and their maxima and is right for any.
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
  V tempered;  // e^{o^s / T}, not set where T = 1 and nothing is guarded
  V teacher;   // e^{o^t / T}
};

template <class V>
struct SegmentationSums {
  SplitSum<V> student;            // anchored at the label; the other three at the teacher's best class
  SplitSum<V> tempered, teacher;
  // Unguarded: v_c = o^t_c - o^s_c of the anchor and e^{o^t/T} v_c of the others. Guarded: e^{o^t/T} v_c of all, v from
  // the maxima as in hakd.h, among the others.
  SplitSum<V> value;
  V smoothed = V(0.f);            // sum_c w_c (o^s_y - o^s_c)
};

// Maxima that were subtracted from the logits before the exponentials: zero in the unguarded visit.
template <class V>
struct SegmentationMaxima {
  V student = V(0.f), teacher = V(0.f);
};

// `label` is Chosen, or NotChosen where the class is no pixel's label. `Smooth`: there may be label smoothing, which alone
// looks at `o_label` here.
template <int Power, bool Teacher, bool Guarded, bool Smooth, class V, class Label, class Real>
HK_INLINE SegmentationClass<V> visit(V o_s, V o_t, Label label, Chosen<V> anchor, V class_weight, V o_label,
                                     const SegmentationParameters<Real>& p, const SegmentationMaxima<V>& maxima,
                                     SegmentationSums<V>& sums) {
  SegmentationClass<V> kept;
  if constexpr (Guarded) {
    const V cold(Real(1) / p.temperature), s = o_s - maxima.student;
    kept.student = math::exp_nonpositive(s);
    if constexpr (Teacher) {
      const V t = o_t - maxima.teacher;
      kept.tempered = math::exp_nonpositive(s * cold);
      kept.teacher = math::exp_nonpositive(t * cold);
      sums.value.others = fma(kept.teacher, math::where_mass(kept.teacher, t - s), sums.value.others);
    }
  } else {
    const V tempered = math::exp2_bounded(o_s);
    kept.student = untempered<Power>(tempered, o_s, V(p.temperature));
    if constexpr (Power != 1) kept.tempered = tempered;
    if constexpr (Teacher) kept.teacher = math::exp2_bounded(o_t);
  }
  if constexpr (Teacher) {
    anchor.add(sums.tempered, Power == 1 ? kept.student : kept.tempered);
    anchor.add(sums.teacher, kept.teacher);
    if constexpr (!Guarded) anchor.add(sums.value, o_t - o_s, kept.teacher * (o_t - o_s));
  }
  label.add(sums.student, kept.student);
  if constexpr (Smooth) {
    V distance = o_label - o_s;
    if constexpr (Guarded) distance = math::where_mass(V(p.smoothing_share) * class_weight, distance);
    sums.smoothed = fma(class_weight, distance, sums.smoothed);
  }
  return kept;
}

// The sums of the unguarded `visit` in natural units.
template <class V, class Real>
HK_INLINE void to_natural(SegmentationSums<V>& sums, const SegmentationParameters<Real>& p) {
  const V unit(static_cast<Real>(p.temperature * math::kLn2));
  sums.value.anchor = sums.value.anchor * unit;
  sums.value.others = sums.value.others * unit;
  sums.smoothed = sums.smoothed * unit;
}

// A pixel's terms, and what its gradient is made of: at class c of weight w_c it is
//   student student_c - smooth w_c, or `labelled` where c is the label, plus
//   tempered tempered_c - teacher teacher_c, or `anchored` where c is the anchor.
template <class V>
struct SegmentationPixel {
  V task, kd;
  V student, labelled, smooth;
  V tempered, teacher, anchored;
};

// `o_label` is looked at in the guarded visit, `label_weight` is the label's class weight; the factors scale the gradients of
// the two terms.
template <bool Teacher, bool Guarded, class V, class Real>
HK_INLINE SegmentationPixel<V> finish(const SegmentationSums<V>& sums, const SegmentationParameters<Real>& p,
                                      V o_label, V label_weight, V task_factor, V kd_factor,
                                      const SegmentationMaxima<V>& maxima) {
  const V one(Real(1));
  SegmentationPixel<V> pixel;
  const V nll = Guarded ? surprise_guarded(sums.student, maxima.student - o_label) : surprise(sums.student);
  const V inverse = one / sums.student.total(), share(p.smoothing_share), all(p.class_weight_sum);
  const V labelled_error = -sums.student.others * inverse;  // p_y - 1, without the cancellation
  const V hard = V(Real(1) - p.smoothing) * label_weight;
  V all_classes = fma(all, nll, sums.smoothed);
  // A label that is switched off is infinitely far from the others, too: inf - inf.
  if constexpr (Guarded) all_classes = select(nll == V(INFINITY), nll, all_classes);
  pixel.task = fma(hard, math::where_mass(hard, nll), share * math::where_mass(share, all_classes));
  pixel.student = task_factor * inverse * fma(share, all, hard);
  pixel.smooth = task_factor * share;
  pixel.labelled = task_factor * fma(hard, labelled_error, share * fma(all, one + labelled_error, -label_weight));
  pixel.kd = V(Real(0));
  if constexpr (Teacher) {
    const V cold(Real(1) / p.temperature), hot(p.temperature), scaled = kd_factor * hot;
    const V inverse_tempered = one / sums.tempered.total(), inverse_teacher = one / sums.teacher.total();
    pixel.tempered = scaled * inverse_tempered;
    pixel.teacher = scaled * inverse_teacher;
    pixel.anchored = scaled * (sums.teacher.others * inverse_teacher - sums.tempered.others * inverse_tempered);
    const V log_ratio = Guarded ? log_total(sums.tempered) - log_total(sums.teacher)
                                : surprise_ratio(sums.tempered, sums.teacher);
    const V differences = sums.value.others - sums.value.anchor * sums.teacher.others;
    pixel.kd = hot * hot * fma(differences * inverse_teacher, cold, log_ratio);
  }
  return pixel;
}

// d (factored terms) / d o^s_c.
template <int Power, bool Teacher, bool Smooth, class V, class Label>
HK_INLINE V gradient(const SegmentationClass<V>& kept, const SegmentationPixel<V>& pixel, Label label, Chosen<V> anchor,
                     V class_weight) {
  V g = kept.student * pixel.student;
  if constexpr (Smooth) g = g - pixel.smooth * class_weight;
  g = label.choose(pixel.labelled, g);
  if constexpr (Teacher) {
    const V tempered = Power == 1 ? kept.student : kept.tempered;
    const V difference = tempered * pixel.tempered - kept.teacher * pixel.teacher;
    g = g + anchor.choose(pixel.anchored, difference);
  }
  return g;
}

}  // namespace hetero
