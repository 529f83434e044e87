// HeteroAKD per pixel (docs/mathematics.md, sections 2 to 6): values and closed-form gradients, for any value type V.
//
// A pixel is evaluated in three steps: one visit of every class, which adds up the normalisers; `finish`, which turns
// them into the pixel's loss and the factors of the gradient; and the gradient of every class.
// Two visits exist. The unguarded one works on the numbers e^z themselves: 3 exponentials and 2 logarithms per class, right for
// |z| <= logit_limit(T); it takes logits in units of T ln 2 (w = z / (T ln 2), so that e^{z / T} = 2^w) and counts
// reliabilities in units of ln 2, which `to_natural` undoes once per pixel. The guarded one works with maxima and
// logarithms, in natural units, and is right for any z.
#pragma once

#include <cmath>

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
  V student;   // e^{z^s / T}
  V weighted;  // W e^{z^h / T}
};

// The same for L_proj.
template <class V>
struct HakdErrors {
  V student, teacher;  // sigma(z) - y
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
  SplitSum<V> value;                      // v_c of the anchor, W e^{z^h/T} v_c of the others, see `finish`
  V weight = V(0.f), proj = V(0.f);
};

// A class that each pixel singles out (its label, its anchor), seen from class c: `mask` is set where it is c.
template <class V>
struct Chosen {
  typename V::Mask mask;
  HK_INLINE V negate(V z) const { return select(mask, -z, z); }
  HK_INLINE V invert(V e) const { return select(mask, V(1.f) / e, e); }
  HK_INLINE V choose(V chosen, V other) const { return select(mask, chosen, other); }
  HK_INLINE void add(SplitSum<V>& sum, V x) const { add(sum, x, x); }
  HK_INLINE void add(SplitSum<V>& sum, V anchor, V other) const {
    sum.others = add_unless(mask, sum.others, other);
    sum.anchor = select(mask, anchor, sum.anchor);
  }
};

// The same for a class that no pixel singles out.
template <class V>
struct NotChosen {
  HK_INLINE V negate(V z) const { return z; }
  HK_INLINE V invert(V e) const { return e; }
  HK_INLINE V choose(V, V other) const { return other; }
  HK_INLINE void add(SplitSum<V>& sum, V x) const { sum.others = sum.others + x; }
};

// S; `reliabilities` is H^s + H^t, `guard` eps in the same units.
template <class V>
HK_INLINE V mixing_ratio(V h_s, V reliabilities, V guard) {
  return (h_s + guard) / (reliabilities + (guard + guard));
}

// z^h. Without mixing it is z^t itself: z^s + (z^t - z^s) would round away what a sure teacher says.
template <class V>
HK_INLINE V hybrid_logit(V z_s, V z_t, V step, bool kmm) {
  return kmm ? z_s + step : z_t;
}

// e^z from e^{z / T}; Power is T where that is 1, 2 or 4, else 0. `w` is z in units of T ln 2.
template <int Power, class V>
HK_INLINE V untempered(V tempered, V w, V temperature) {
  if constexpr (Power == 1) return tempered;
  if constexpr (Power == 2) return tempered * tempered;
  if constexpr (Power == 4) return (tempered * tempered) * (tempered * tempered);
  return math::exp2_bounded(w * temperature);
}

// e^q = e^{H^s} max(1, e^{H^s} / e^{H^h}), of u = e^H = 1 + e^{-+z}.
template <class V>
HK_INLINE V exp_score(V u_s, V u_h) {
  return u_s * maximum(u_s / u_h, V(1.f));
}

// A class's visit is three steps, `exponentials`, `mix` and `weigh`, to be taken by many classes each before the next: in
// one go they are a chain of 200 cycles of latency, of which a processor's window holds only two.
// `label` is Chosen, or NotChosen where the class is no pixel's label: inverting costs a division.
template <class V>
struct HakdVisit {
  V w_s, step;   // z^s and z^h - z^s in units of T ln 2; before `mix`, step is z^t - z^s
  V student;     // e^{z^s / T}
  V a_s, a_t;    // e^{-+z}: e^H = 1 + a
};

template <int Power, class V, class Label, class Real>
HK_INLINE HakdVisit<V> exponentials(V w_s, V w_t, Label label, Chosen<V> anchor, const HakdParameters<Real>& p,
                                    HakdSums<V>& sums) {
  const V hot(p.temperature), student = math::exp2_bounded(w_s);
  anchor.add(sums.student, student);
  return {w_s, w_t - w_s, student, label.invert(untempered<Power>(student, w_s, hot)),
          label.invert(math::exp2_bounded(Power == 1 ? w_t : w_t * hot))};
}

template <bool Errors, class V, class Label, class Real>
HK_INLINE void mix(HakdVisit<V>& visit, Label label, const HakdParameters<Real>& p, HakdSums<V>& sums,
                   HakdErrors<V>* errors) {
  const V h_s = math::log2_1p(visit.a_s), reliabilities = h_s + math::log2_1p(visit.a_t);
  sums.proj = sums.proj + reliabilities;
  if (p.kmm) visit.step = mixing_ratio(h_s, reliabilities, V(Real(kMixGuard * math::kLog2e))) * visit.step;
  if constexpr (Errors) {
    const V one(Real(1));
    *errors = {label.negate(visit.a_s / (one + visit.a_s)), label.negate(visit.a_t / (one + visit.a_t))};
  }
}

// `w_t` is looked at only without mixing; `spatial_scale` is 1 / sum_n e^q of the class over the image (Kem::kSpatial).
template <int Power, class V, class Label, class Real>
HK_INLINE HakdClass<V> weigh(const HakdVisit<V>& visit, V w_t, Label label, Chosen<V> anchor,
                             const HakdParameters<Real>& p, V spatial_scale, HakdSums<V>& sums) {
  const V w_h = hybrid_logit(visit.w_s, w_t, visit.step, p.kmm);
  const V hybrid = math::exp2_bounded(w_h);
  HakdClass<V> kept{visit.student, hybrid};
  if (p.kem != Kem::kNone) {
    const V one(Real(1)), a_h = label.invert(untempered<Power>(hybrid, w_h, V(p.temperature)));
    V weight = exp_score(one + visit.a_s, one + a_h);
    if (p.kem == Kem::kSpatial) weight = weight * spatial_scale;
    sums.weight = sums.weight + weight;
    kept.weighted = hybrid * weight;
  }
  const V value = p.cross_entropy ? -visit.w_s : visit.step;
  anchor.add(sums.hybrid, hybrid);
  anchor.add(sums.weighted, kept.weighted);
  anchor.add(sums.value, value, kept.weighted * value);
  return kept;
}

// The sums of `visit` in natural units.
template <class V, class Real>
HK_INLINE void to_natural(HakdSums<V>& sums, const HakdParameters<Real>& p) {
  const V ln2{static_cast<Real>(math::kLn2)}, unit{static_cast<Real>(p.temperature * math::kLn2)};
  sums.proj = sums.proj * ln2;
  sums.value.anchor = sums.value.anchor * unit;
  sums.value.others = sums.value.others * unit;
}

// The guarded counterpart of HakdVisit, in natural units, in two steps that many classes take together: `reliabilities`
// and `score`.
template <class V>
struct HakdMeasured {
  V z_s, step;  // z^s and z^t - z^s, or -inf where z^s is
  V h_s, h_t;   // H(z^s), H(z^t)
  V z_h, score; // z^h and KEM's q
};

template <class V>
HK_INLINE void reliabilities(V z_s, V z_t, Chosen<V> label, HakdMeasured<V>& m) {
  m.z_s = z_s;
  m.step = select(z_s == V(-INFINITY), z_s, z_t - z_s);  // of a masked class z^h is -inf, too
  m.h_s = math::softplus(label.negate(z_s));
  m.h_t = math::softplus(label.negate(z_t));
}

// `z_t` is looked at only without mixing. z^h is formed by one fma, so that whoever asks again gets the same bits: the
// distance of an anchor from its maximum must come out as 0.
template <class V>
HK_INLINE void score(V z_t, Chosen<V> label, bool kmm, HakdMeasured<V>& m) {
  m.z_h = z_t;
  if (kmm) {
    const V ratio = mixing_ratio(m.h_s, m.h_s + m.h_t, V(typename V::Real(kMixGuard)));
    m.z_h = fma(ratio, m.step, m.z_s);
  }
  m.score = m.h_s + maximum(V(0.f), m.h_s - math::softplus(label.negate(m.z_h)));
}

// e^q of one class, after `exponentials` and `mix`: what kem="spatial" adds up over the image.
template <class V, class Label, class Real>
HK_INLINE V spatial_score(const HakdVisit<V>& visit, V w_t, Label label, const HakdParameters<Real>& p) {
  const V one(Real(1)), w_h = hybrid_logit(visit.w_s, w_t, visit.step, p.kmm);
  return exp_score(one + visit.a_s, one + label.invert(math::exp2_bounded(w_h * V(p.temperature))));
}

// What the second guarded visit needs to know beforehand.
template <class V>
struct HakdMaxima {
  V student, hybrid, score;
};

// Second step of the first guarded visit; `reliabilities` was the first.
template <bool Errors, class V, class Real>
HK_INLINE void measure(V z_t, Chosen<V> label, const HakdParameters<Real>& p, HakdMeasured<V>& m, HakdMaxima<V>& maxima,
                       HakdSums<V>& sums, HakdErrors<V>* errors) {
  score(z_t, label, p.kmm, m);
  maxima.student = maximum(m.z_s, maxima.student);
  maxima.hybrid = maximum(m.z_h, maxima.hybrid);
  maxima.score = maximum(m.score, maxima.score);
  sums.proj = sums.proj + (m.h_s + m.h_t);
  if constexpr (Errors) {
    *errors = {label.negate(math::sigmoid(label.negate(m.z_s))), label.negate(math::sigmoid(label.negate(z_t)))};
  }
}

// Second guarded visit, in two steps so that each one's sums stay in registers.
template <class V, class Real>
HK_INLINE void weigh_student(const HakdMeasured<V>& m, Chosen<V> anchor, const HakdParameters<Real>& p,
                             const HakdMaxima<V>& maxima, HakdSums<V>& sums, HakdClass<V>& kept) {
  kept.student = math::exp_nonpositive((m.z_s - maxima.student) * V(Real(1) / p.temperature));
  anchor.add(sums.student, kept.student);
}

// `spatial_maximum` m and `spatial_scale` 1 / sum_n e^{q - m} are the class's over the image (Kem::kSpatial).
template <class V, class Real>
HK_INLINE void weigh_hybrid(const HakdMeasured<V>& m, Chosen<V> anchor, const HakdParameters<Real>& p, V spatial_maximum,
                            V spatial_scale, const HakdMaxima<V>& maxima, HakdSums<V>& sums, HakdClass<V>& kept) {
  const V hybrid = math::exp_nonpositive((m.z_h - maxima.hybrid) * V(Real(1) / p.temperature));
  kept.weighted = hybrid;
  if (p.kem != Kem::kNone) {
    V weight = math::exp_nonpositive(m.score - (p.kem == Kem::kSpatial ? spatial_maximum : maxima.score));
    if (p.kem == Kem::kSpatial) weight = weight * spatial_scale;
    sums.weight = sums.weight + weight;
    kept.weighted = hybrid * weight;
  }
  anchor.add(sums.hybrid, hybrid);
  anchor.add(sums.weighted, kept.weighted);
  // From the maxima, which is exact and no larger than it must be, where z^h - z^s may be 1e4 for a loss of 1.
  const V below = maxima.student - m.z_s, distance = p.cross_entropy ? below : below - (maxima.hybrid - m.z_h);
  sums.value.others = fma(kept.weighted, math::where_mass(kept.weighted, distance), sums.value.others);
}

// -log of the anchor's probability, after the unguarded and the guarded visit.
template <class V>
HK_INLINE V surprise(const SplitSum<V>& sum) {
  return math::log1p(sum.others / sum.anchor);
}

// surprise(a) - surprise(b), as one logarithm: the two may be large and close.
template <class V>
HK_INLINE V surprise_ratio(const SplitSum<V>& a, const SplitSum<V>& b) {
  const V x = a.others / a.anchor, y = b.others / b.anchor, zero(0.f);
  const V log = math::log1p(maximum(x - y, y - x) / (V(1.f) + select(x > y, y, x)));
  return select(x > y, log, zero - log);
}

// log of a sum of numerators e^{(z - maximum) / T}, of which an anchor with the highest logit is 1.
template <class V>
HK_INLINE V log_total(const SplitSum<V>& sum) {
  return select(sum.anchor == V(1.f), math::log1p(sum.others), math::log_from_one(sum.total()));
}

// `distance` is (maximum - z_anchor) / T.
template <class V>
HK_INLINE V surprise_guarded(const SplitSum<V>& sum, V distance) {
  return distance + log_total(sum);
}

// `finish`'s log_ratio after the guarded visit.
template <class V, class Real>
HK_INLINE V log_ratio_guarded(const HakdSums<V>& sums, const HakdParameters<Real>& p) {
  const V student = log_total(sums.student);
  return p.cross_entropy ? student : student - log_total(sums.hybrid);
}

template <class V>
struct HakdPixel {
  V loss;               // l_n of section 5
  V student_factor;     // dl_n / dz^s_c = T (student_factor student_c - weighted_factor weighted_c)
  V weighted_factor;
  V anchor_gradient;    // the same / T for the anchor, without the cancellation
};

// log p^h_c - log p^s_c ("kl") or -log p^s_c ("ce") is log_ratio + (v_c - v_a) / T. Unguarded: log_ratio is that of the
// anchor a, v_c = z^h_c - z^s_c or -z^s_c. Guarded: v_c = (m^s - z^s_c) - (m^h - z^h_c) or m^s - z^s_c, from the maxima,
// and v_a = 0: the anchor's own is among the others'.
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

// What the gradient of a pixel's classes is made of; `factor` is the pixel's, times T.
template <class V>
struct HakdFactors {
  V student, weighted, anchored;
};

template <class V>
HK_INLINE HakdFactors<V> gradient_factors(const HakdPixel<V>& pixel, V factor) {
  return {factor * pixel.student_factor, factor * pixel.weighted_factor, factor * pixel.anchor_gradient};
}

// d (factored L_hakd) / d z^s_c.
template <class V>
HK_INLINE V gradient(const HakdClass<V>& kept, Chosen<V> anchor, const HakdFactors<V>& factors) {
  return anchor.choose(factors.anchored, kept.student * factors.student - kept.weighted * factors.weighted);
}

// A score in the sum of e^{q - maximum} over an image (Kem::kSpatial), where the maximum may have to rise; pixels that
// do not count change nothing.
template <class V>
HK_INLINE void add_score(V q, typename V::Mask counts, V& highest, V& sum) {
  const V zero(0.f), before = maximum(highest, zero), now = maximum(select(counts, q, zero), before);
  const V old = sum * math::exp_nonpositive(before - now);
  sum = old + select(counts, math::exp_nonpositive(q - now), zero);
  highest = now;
}

}  // namespace hetero
