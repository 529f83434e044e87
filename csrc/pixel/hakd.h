// HeteroAKD per pixel (docs/mathematics.md, sections 2 to 6): values and closed-form gradients, for any value type V.
//
// A pixel is evaluated in three steps: one visit of every class, which adds up the normalisers; `finish`, which turns
// them into the pixel's loss and the factors of the gradient; and the gradient of every class.
// Two visits exist. `visit` works on the numbers e^z themselves: 3 exponentials and 2 logarithms per class, right for
// |z| <= logit_limit(T). `measure` and `visit_guarded` work with maxima and logarithms and are right for any z.
#pragma once

#include "math.h"

namespace hetero {

enum class Kem : int { kNone, kClass, kSpatial };

constexpr double kMixGuard = 1e-6;  // eps of section 3

template <class Real>
struct HakdParameters {
  Real temperature = 1;
  bool kmm = true;
  Kem kem = Kem::kClass;
  bool cross_entropy = false;  // divergence "ce"
};

// Largest |z| for which `visit` and `finish` stay in float's range over a thousand classes: their largest product is
// K^2 e^{2z} e^{z/T}, their largest quotient K e^{2z/T}.
inline double logit_limit(double temperature) {
  const double product = 70.0 / (2.0 + 1.0 / temperature), quotient = 38.0 * temperature;
  const double limit = product < quotient ? product : quotient;
  return limit < 24.0 ? limit : 24.0;
}

// What a class keeps until the gradient is formed.
template <class V>
struct HakdClass {
  V student;        // e^{z^s / T}
  V weighted;       // W e^{z^h / T}
  V student_error;  // sigma(z^s) - y
  V teacher_error;  // sigma(z^t) - y
};

// A sum over classes that keeps one class apart, the anchor. A network that is sure of a class has all but 1e-6 of its
// mass there, and its tiny loss and gradient are differences from it: they are formed from the others' part. For
// cross-entropy the anchor is the label, for a divergence a network's best class.
template <class V>
struct SplitSum {
  V anchor = V(0.f), others = V(0.f);
  HK_INLINE V total() const { return anchor + others; }
};

template <class V>
struct HakdSums {
  SplitSum<V> student, hybrid, weighted;  // of e^{z^s/T}, e^{z^h/T}, W e^{z^h/T}
  SplitSum<V> value;                      // of v_c (the anchor) and W e^{z^h/T} v_c (the others), see `finish`
  V weight = V(0.f), proj = V(0.f);
};

// A class that each pixel singles out (its label, its anchor), seen from class c: `mask` is set where it is c, and `none`
// spares the work where it is c for no pixel.
template <class V>
struct Chosen {
  typename V::Mask mask;
  bool none;
  HK_INLINE V negate(V z) const { return none ? z : select(mask, -z, z); }
  HK_INLINE V invert(V e) const { return none ? e : select(mask, V(1.f) / e, e); }
  HK_INLINE void add(SplitSum<V>& sum, V x) const { add(sum, x, x); }
  HK_INLINE void add(SplitSum<V>& sum, V anchor, V other) const {
    if (none) {
      sum.others = sum.others + other;
    } else {
      sum.others = sum.others + select(mask, V(0.f), other);
      sum.anchor = select(mask, anchor, sum.anchor);
    }
  }
};

template <class V>
HK_INLINE V mixing_step(V h_s, V h_t, V z_s, V z_t, bool kmm) {  // z^h - z^s
  if (!kmm) return z_t - z_s;
  const V guard = V(typename V::Real(kMixGuard));
  const V guarded = h_s + guard;
  return guarded / (guarded + (h_t + guard)) * (z_t - z_s);
}

// z^h. Without mixing it is z^t itself: z^s + (z^t - z^s) would round away what a sure teacher says.
template <class V>
HK_INLINE V hybrid_logit(V z_s, V z_t, V step, bool kmm) {
  return kmm ? z_s + step : z_t;
}

// e^z from e^{z / T}; Power is T where that is 1, 2 or 4, else 0.
template <int Power, class V>
HK_INLINE V untempered(V tempered, V z) {
  if constexpr (Power == 1) return tempered;
  if constexpr (Power == 2) return tempered * tempered;
  if constexpr (Power == 4) return (tempered * tempered) * (tempered * tempered);
  return math::exp_bounded(z);
}

template <class V, class Real>
HK_INLINE void add_class(const HakdClass<V>& kept, V hybrid, V z_s, V step, Chosen<V> anchor,
                         const HakdParameters<Real>& p, HakdSums<V>& sums) {
  const V value = p.cross_entropy ? -z_s : step;
  anchor.add(sums.student, kept.student);
  anchor.add(sums.hybrid, hybrid);
  anchor.add(sums.weighted, kept.weighted);
  anchor.add(sums.value, value, kept.weighted * value);
}

// One class. `spatial_scale` is 1 / sum_n e^q of the class over the image (Kem::kSpatial).
template <int Power, bool Errors, class V, class Real>
HK_INLINE HakdClass<V> visit(V z_s, V z_t, Chosen<V> label, Chosen<V> anchor, const HakdParameters<Real>& p,
                             V spatial_scale, HakdSums<V>& sums) {
  const V cold = V(Real(1) / p.temperature);
  HakdClass<V> kept;
  kept.student = math::exp_bounded(z_s * cold);
  const V a_s = label.invert(untempered<Power>(kept.student, z_s));
  const V a_t = label.invert(math::exp_bounded(z_t));
  const V u_s = V(1.f) + a_s, u_t = V(1.f) + a_t;
  const V h_s = math::log1p(a_s), h_t = math::log1p(a_t);
  const V step = mixing_step(h_s, h_t, z_s, z_t, p.kmm);
  const V z_h = hybrid_logit(z_s, z_t, step, p.kmm);
  const V hybrid = math::exp_bounded(z_h * cold);
  kept.weighted = hybrid;
  if (p.kem != Kem::kNone) {
    // e^q = e^{H^s} max(1, e^{H^s} / e^{H^h}) with e^H = 1 + e^{-+z}
    const V ratio = u_s / (V(1.f) + label.invert(untempered<Power>(hybrid, z_h)));
    V weight = u_s * select(ratio > V(1.f), ratio, V(1.f));
    if (p.kem == Kem::kSpatial) weight = weight * spatial_scale;
    sums.weight = sums.weight + weight;
    kept.weighted = hybrid * weight;
  }
  if constexpr (Errors) {
    const V sigma_s = a_s / u_s, sigma_t = a_t / u_t;
    kept.student_error = label.negate(sigma_s);
    kept.teacher_error = label.negate(sigma_t);
  }
  sums.proj = sums.proj + (h_s + h_t);
  add_class(kept, hybrid, z_s, step, anchor, p, sums);
  return kept;
}

// KEM's score q of one class, with the mixing step, z^h and both reliabilities: right for any z.
template <class V>
struct HakdScore {
  V step, z_h, score, h_s, h_t;
};

template <class V>
HK_INLINE HakdScore<V> score_guarded(V z_s, V z_t, Chosen<V> label, bool kmm) {
  HakdScore<V> s;
  s.h_s = math::softplus(label.negate(z_s));
  s.h_t = math::softplus(label.negate(z_t));
  s.step = mixing_step(s.h_s, s.h_t, z_s, z_t, kmm);
  s.z_h = hybrid_logit(z_s, z_t, s.step, kmm);
  const V gain = s.h_s - math::softplus(label.negate(s.z_h));
  s.score = s.h_s + select(gain > V(0.f), gain, V(0.f));
  return s;
}

// e^q of one class for |z| <= logit_limit(T): what kem="spatial" adds up over the image.
template <class V>
HK_INLINE V exp_score(V z_s, V z_t, Chosen<V> label, bool kmm) {
  const V a_s = label.invert(math::exp_bounded(z_s)), a_t = label.invert(math::exp_bounded(z_t));
  const V step = mixing_step(math::log1p(a_s), math::log1p(a_t), z_s, z_t, kmm);
  const V z_h = hybrid_logit(z_s, z_t, step, kmm);
  const V u_s = V(1.f) + a_s;
  const V ratio = u_s / (V(1.f) + label.invert(math::exp_bounded(z_h)));
  return u_s * select(ratio > V(1.f), ratio, V(1.f));
}

// First guarded visit: what the second one needs to know beforehand.
template <class V>
struct HakdMaxima {
  V student, hybrid, score;
};

template <class V>
struct HakdMeasured {
  V z_s, z_h, step, score;
};

template <bool Errors, class V, class Real>
HK_INLINE HakdMeasured<V> measure(V z_s, V z_t, Chosen<V> label, const HakdParameters<Real>& p, HakdMaxima<V>& maxima,
                                  HakdSums<V>& sums, HakdClass<V>& kept) {
  const HakdScore<V> s = score_guarded(z_s, z_t, label, p.kmm);
  maxima.student = math::maximum(z_s, maxima.student);
  maxima.hybrid = math::maximum(s.z_h, maxima.hybrid);
  maxima.score = math::maximum(s.score, maxima.score);
  sums.proj = sums.proj + (s.h_s + s.h_t);
  if constexpr (Errors) {
    kept.student_error = label.negate(math::sigmoid(label.negate(z_s)));
    kept.teacher_error = label.negate(math::sigmoid(label.negate(z_t)));
  }
  return {z_s, s.z_h, s.step, s.score};
}

// Second guarded visit. `spatial_maximum` m and `spatial_scale` 1 / sum_n e^{q - m} are the class's over the image
// (Kem::kSpatial).
template <class V, class Real>
HK_INLINE void visit_guarded(const HakdMeasured<V>& m, Chosen<V> anchor, const HakdParameters<Real>& p,
                             V spatial_maximum, V spatial_scale, const HakdMaxima<V>& maxima, HakdSums<V>& sums,
                             HakdClass<V>& kept) {
  const V cold = V(Real(1) / p.temperature);
  kept.student = math::exp_nonpositive((m.z_s - maxima.student) * cold);
  const V hybrid = math::exp_nonpositive((m.z_h - maxima.hybrid) * cold);
  kept.weighted = hybrid;
  if (p.kem != Kem::kNone) {
    const V weight = p.kem == Kem::kSpatial ? math::exp_nonpositive(m.score - spatial_maximum) * spatial_scale
                                            : math::exp_nonpositive(m.score - maxima.score);
    sums.weight = sums.weight + weight;
    kept.weighted = hybrid * weight;
  }
  add_class(kept, hybrid, m.z_s, m.step, anchor, p, sums);
}

// -log of the anchor's probability, after the unguarded and the guarded visit. `distance` is (maximum - z_anchor) / T:
// where it is 0 the anchor's numerator is 1.
template <class V>
HK_INLINE V surprise(const SplitSum<V>& sum) {
  return math::log1p(sum.others / sum.anchor);
}
template <class V>
HK_INLINE V surprise_guarded(const SplitSum<V>& sum, V distance) {
  return distance + select(distance == V(0.f), math::log1p(sum.others), math::log(sum.total()));
}

template <class V>
struct HakdPixel {
  V loss;               // l_n of section 5
  V student_factor;     // dl_n / dz^s_c = T (student_factor student_c - weighted_factor weighted_c)
  V weighted_factor;
  V anchor_gradient;    // the same / T for the anchor, without the cancellation
};

// `log_ratio` is log p^h_a - log p^s_a ("kl") or -log p^s_a ("ce") of the anchor a. With v_c = z^h_c - z^s_c ("kl") or
// -z^s_c ("ce"), log p^h_c - log p^s_c = log_ratio + (v_c - v_a) / T.
template <class V, class Real>
HK_INLINE HakdPixel<V> finish(const HakdSums<V>& sums, const HakdParameters<Real>& p, V log_ratio) {
  const V cold = V(Real(1) / p.temperature), hot = V(p.temperature);
  const V student = sums.student.total(), hybrid = sums.hybrid.total(), weighted = sums.weighted.total();
  HakdPixel<V> pixel;
  pixel.weighted_factor = V(1.f) / (p.kem == Kem::kClass ? hybrid * sums.weight : hybrid);
  pixel.student_factor = weighted * pixel.weighted_factor / student;
  // Of probabilities, not of numerators, whose products would leave float's range.
  pixel.anchor_gradient = sums.student.anchor / student * (sums.weighted.others * pixel.weighted_factor) -
                          sums.weighted.anchor * pixel.weighted_factor * (sums.student.others / student);
  const V differences = sums.value.others - sums.value.anchor * sums.weighted.others;
  pixel.loss = hot * hot * pixel.weighted_factor * fma(weighted, log_ratio, differences * cold);
  return pixel;
}

}  // namespace hetero
