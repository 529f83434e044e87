// The pixel losses on the walk of walk.h; what happens at a pixel is in csrc/pixel/. Included by one translation unit per
// instruction set.
#pragma once

#include "walk.h"

namespace hetero::cpu {

// A network's best class of each pixel of a vector, the first where several are.
template <class V>
HK_INLINE void best_classes(const TileRow<V>& network, int64_t classes, int x, int32_t* best) {
  using Real = typename V::Real;
  V highest(-INFINITY), index(Real(0));
  for (int64_t c = 0; c < classes; ++c) {
    const V z = network.logit(c, x);
    index = select(z > highest, V(static_cast<Real>(c)), index);
    highest = math::maximum(z, highest);
  }
  alignas(64) Real lanes[V::kLanes];
  index.store(lanes);
  for (int i = 0; i < V::kLanes; ++i) best[i] = static_cast<int32_t>(lanes[i]);
}

// hakd ---------------------------------------------------------------------------------------------------------

template <class V>
struct HakdLoop {
  using Real = typename V::Real;
  const HakdProblem<Real>& problem;
  HakdClass<V>* kept;        // [K]
  HakdMeasured<V>* measured; // [K]

  HK_INLINE V per_class(const Real* values, int64_t image, int64_t c) const {
    return V(values[image * problem.classes + c]);
  }

  template <int Power, bool Errors>
  HK_INLINE HakdPixel<V> unguarded(int64_t image, int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors,
                                   const TileRow<V>& student, const TileRow<V>& teacher, HakdSums<V>& sums) const {
    const HakdParameters<Real>& p = problem.parameters;
    const bool spatial = p.kem == Kem::kSpatial;
    for (int64_t c = 0; c < problem.classes; ++c) {
      const V scale = spatial ? per_class(problem.spatial_scale_unguarded, image, c) : V(Real(1));
      kept[c] = visit<Power, Errors>(student.logit(c, x), teacher.logit(c, x), pixels.labels.at(c), anchors.at(c), p,
                                     scale, sums);
    }
    V log_ratio = surprise(sums.student);
    if (!p.cross_entropy) log_ratio = log_ratio - surprise(sums.hybrid);
    return finish(sums, p, log_ratio);
  }

  template <bool Errors>
  HakdPixel<V> guarded(int64_t image, int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors,
                       const TileRow<V>& student, const TileRow<V>& teacher, HakdSums<V>& sums) const {
    const HakdParameters<Real>& p = problem.parameters;
    const bool spatial = p.kem == Kem::kSpatial;
    const V lowest(-INFINITY), zero(Real(0)), cold(Real(1) / p.temperature);
    HakdMaxima<V> maxima{lowest, lowest, lowest};
    for (int64_t c = 0; c < problem.classes; ++c) {
      measured[c] =
          measure<Errors>(student.logit(c, x), teacher.logit(c, x), pixels.labels.at(c), p, maxima, sums, kept[c]);
    }
    for (int64_t c = 0; c < problem.classes; ++c) {
      const V maximum = spatial ? per_class(problem.spatial_maximum, image, c) : zero;
      const V scale = spatial ? per_class(problem.spatial_scale, image, c) : zero;
      visit_guarded(measured[c], anchors.at(c), p, maximum, scale, maxima, sums, kept[c]);
    }
    const V z_s = anchors.pick([&](int c) { return measured[c].z_s; });
    V log_ratio = surprise_guarded(sums.student, (maxima.student - z_s) * cold);
    if (!p.cross_entropy) {
      const V z_h = anchors.pick([&](int c) { return measured[c].z_h; });
      log_ratio = log_ratio - surprise_guarded(sums.hybrid, (maxima.hybrid - z_h) * cold);
    }
    return finish(sums, p, log_ratio);
  }

  template <bool Errors>
  HK_INLINE void gradients(int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors, const HakdPixel<V>& pixel,
                           const TileRow<V>& student, const TileRow<V>& teacher) const {
    const V hakd = pixels.factor * V(problem.coefficient[0] * problem.parameters.temperature);
    const V proj = pixels.factor * V(problem.coefficient[1] / static_cast<Real>(problem.classes));
    const V student_factor = hakd * pixel.student_factor, weighted_factor = hakd * pixel.weighted_factor;
    const V anchored = hakd * pixel.anchor_gradient;
    for (int64_t c = 0; c < problem.classes; ++c) {
      if (student.gradient) {
        V g = kept[c].student * student_factor - kept[c].weighted * weighted_factor;
        const Chosen<V> anchor = anchors.at(c);
        if (!anchor.none) g = select(anchor.mask, anchored, g);
        if constexpr (Errors) g = fma(kept[c].student_error, proj, g);
        student.add(c, x, pixels.masked(g));
      }
      if constexpr (Errors) {
        if (teacher.gradient) teacher.add(c, x, pixels.masked(kept[c].teacher_error * proj));
      }
    }
  }

  template <int Power, bool Errors>
  void run(Scratch& scratch, int64_t begin, int64_t end) const {
    const V per_class_share(Real(1) / static_cast<Real>(problem.classes));
    walk<V>(
        problem, scratch, begin, end,
        [&](int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels, const TileRow<V>& student,
            const TileRow<V>& teacher, bool bounded, RowBuffers<V>& buffers) {
          HakdSums<V> sums;
          alignas(64) int32_t best[V::kLanes];
          best_classes(problem.parameters.kmm ? student : teacher, problem.classes, x, best);
          const ClassPerPixel<V> anchors(best);
          const HakdPixel<V> pixel = bounded
                                         ? unguarded<Power, Errors>(image, x, pixels, anchors, student, teacher, sums)
                                         : guarded<Errors>(image, x, pixels, anchors, student, teacher, sums);
          buffers.record(image, row, x0, x, n, pixels.masked(pixel.loss), pixels.masked(sums.proj * per_class_share));
          if (student.gradient || teacher.gradient) gradients<Errors>(x, pixels, anchors, pixel, student, teacher);
        },
        [](int64_t) {});
  }

  template <int Power>
  void run_errors(Scratch& scratch, int64_t begin, int64_t end) const {
    const bool gradient = problem.student.gradient != nullptr || problem.teacher.gradient != nullptr;
    gradient && problem.coefficient[1] != 0 ? run<Power, true>(scratch, begin, end) : run<Power, false>(scratch, begin, end);
  }
};

template <class V>
void hakd(const HakdProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  const int64_t kept_bytes = problem.classes * int64_t(sizeof(HakdClass<V>));
  const int64_t measured_bytes = problem.classes * int64_t(sizeof(HakdMeasured<V>));
  Scratch scratch(walk_bytes<V>(problem) + kept_bytes + measured_bytes + 128);
  const HakdLoop<V> loop{problem, static_cast<HakdClass<V>*>(scratch.take(kept_bytes)),
                         static_cast<HakdMeasured<V>*>(scratch.take(measured_bytes))};
  const double temperature = problem.parameters.temperature;
  if (temperature == 1) {
    loop.template run_errors<1>(scratch, begin, end);
  } else if (temperature == 2) {
    loop.template run_errors<2>(scratch, begin, end);
  } else if (temperature == 4) {
    loop.template run_errors<4>(scratch, begin, end);
  } else {
    loop.template run_errors<0>(scratch, begin, end);
  }
}

// First pass of kem="spatial": per item and class the maximum m of the scores q and the sum of e^{q - m}.
template <class V>
void hakd_scores(const HakdProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  using Real = typename V::Real;
  const int64_t bytes = problem.classes * int64_t(sizeof(V));
  Scratch scratch(walk_bytes<V>(problem) + 2 * bytes + 128);
  V* maxima = static_cast<V*>(scratch.take(bytes));
  V* sums = static_cast<V*>(scratch.take(bytes));
  const V lowest(-INFINITY), zero(Real(0));
  bool guarded = false;  // once in a block: from there on its sums are measured from the maxima, not from 0
  const auto clear = [&] {
    guarded = false;
    for (int64_t c = 0; c < problem.classes; ++c) {
      maxima[c] = lowest;
      sums[c] = zero;
    }
  };
  clear();
  const bool kmm = problem.parameters.kmm;
  walk<V>(
      problem, scratch, begin, end,
      [&](int64_t, int64_t, int64_t, int x, int, const Pixels<V>& pixels, const TileRow<V>& student,
          const TileRow<V>& teacher, bool bounded, RowBuffers<V>&) {
        guarded = guarded || !bounded;
        for (int64_t c = 0; c < problem.classes; ++c) {
          const V z_s = student.logit(c, x), z_t = teacher.logit(c, x);
          if (bounded && !guarded) {
            sums[c] = sums[c] + pixels.masked(exp_score(z_s, z_t, pixels.labels.at(c), kmm));
          } else {
            const V score = select(pixels.valid, score_guarded(z_s, z_t, pixels.labels.at(c), kmm).score, lowest);
            const V maximum = math::maximum(score, math::maximum(maxima[c], zero));
            const V old = math::exp_nonpositive(math::maximum(maxima[c], zero) - maximum);
            sums[c] = fma(sums[c], old, pixels.masked(math::exp_nonpositive(score - maximum)));
            maxima[c] = maximum;
          }
        }
      },
      [&](int64_t index) {
        for (int64_t c = 0; c < problem.classes; ++c) {
          alignas(64) Real m[V::kLanes], s[V::kLanes];
          maxima[c].store(m);
          sums[c].store(s);
          double* total = problem.score_sums + (index * problem.classes + c) * 2;
          for (int i = 0; i < V::kLanes; ++i) {
            const double lane_maximum = m[i] > 0 ? m[i] : 0;  // unguarded blocks measure from 0
            const double higher = lane_maximum > total[0] ? lane_maximum : total[0];
            total[1] = total[1] * std::exp(total[0] - higher) + double(s[i]) * std::exp(lane_maximum - higher);
            total[0] = higher;
          }
        }
        clear();
      });
}

// segmentation -------------------------------------------------------------------------------------------------

template <class V>
struct SegmentationLoop {
  using Real = typename V::Real;
  const SegmentationProblem<Real>& problem;
  SegmentationClass<V>* kept;  // [K]

  template <int Power, bool Teacher, bool Guarded>
  HK_INLINE void pixel(int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels,
                       const TileRow<V>& student, const TileRow<V>& teacher, RowBuffers<V>& buffers) const {
    const SegmentationParameters<Real>& p = problem.parameters;
    const auto teacher_logit = [&](int64_t c) { return Teacher ? teacher.logit(c, x) : V(Real(0)); };
    SegmentationMaxima<V> maxima;
    if constexpr (Guarded) {
      maxima.student = maxima.teacher = V(-INFINITY);
      for (int64_t c = 0; c < problem.classes; ++c) {
        maxima.student = math::maximum(student.logit(c, x), maxima.student);
        if constexpr (Teacher) maxima.teacher = math::maximum(teacher_logit(c), maxima.teacher);
      }
    }
    alignas(64) int32_t best[V::kLanes];
    if constexpr (Teacher) best_classes(teacher, problem.classes, x, best);
    const ClassPerPixel<V> anchors = Teacher ? ClassPerPixel<V>(best) : pixels.labels;
    const auto student_logit = [&](int64_t c) { return student.logit(c, x); };
    SegmentationReference<V> reference;
    if (Guarded || p.smoothing != 0) reference.label = pixels.labels.pick(student_logit);
    if constexpr (Guarded && Teacher) {
      reference.student_anchor = anchors.pick(student_logit);
      reference.teacher_anchor = anchors.pick(teacher_logit);
    }
    const V label_weight = pixels.labels.pick([&](int c) { return V(problem.class_weight[c]); });
    SegmentationSums<V> sums;
    for (int64_t c = 0; c < problem.classes; ++c) {
      kept[c] = visit<Power, Teacher, Guarded>(student_logit(c), teacher_logit(c), pixels.labels.at(c), anchors.at(c),
                                               V(problem.class_weight[c]), reference.label, p, maxima, sums);
    }
    const SegmentationPixel<V> done = finish<Teacher, Guarded>(sums, p, reference, label_weight, maxima);
    buffers.record(image, row, x0, x, n, pixels.masked(done.task), pixels.masked(done.kd));
    if (!student.gradient) return;
    const V task = pixels.factor * V(problem.coefficient[0]), kd = pixels.factor * V(problem.coefficient[1]);
    for (int64_t c = 0; c < problem.classes; ++c) {
      V g = task * task_gradient(kept[c], done, pixels.labels.at(c), V(problem.class_weight[c]), label_weight, p);
      if constexpr (Teacher) g = fma(kd, kd_gradient(kept[c], done, anchors.at(c), p), g);
      student.add(c, x, pixels.masked(g));
    }
  }

  template <int Power, bool Teacher>
  void run(Scratch& scratch, int64_t begin, int64_t end) const {
    walk<V>(
        problem, scratch, begin, end,
        [&](int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels, const TileRow<V>& student,
            const TileRow<V>& teacher, bool bounded, RowBuffers<V>& buffers) {
          if (bounded) {
            pixel<Power, Teacher, false>(image, row, x0, x, n, pixels, student, teacher, buffers);
          } else {
            pixel<0, Teacher, true>(image, row, x0, x, n, pixels, student, teacher, buffers);
          }
        },
        [](int64_t) {});
  }
};

template <class V>
void segmentation(const SegmentationProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  const int64_t bytes = problem.classes * int64_t(sizeof(SegmentationClass<V>));
  Scratch scratch(walk_bytes<V>(problem) + bytes + 64);
  const SegmentationLoop<V> loop{problem, static_cast<SegmentationClass<V>*>(scratch.take(bytes))};
  const double temperature = problem.parameters.temperature;
  if (!problem.has_teacher) {
    loop.template run<1, false>(scratch, begin, end);
  } else if (temperature == 1) {
    loop.template run<1, true>(scratch, begin, end);
  } else if (temperature == 2) {
    loop.template run<2, true>(scratch, begin, end);
  } else if (temperature == 4) {
    loop.template run<4, true>(scratch, begin, end);
  } else {
    loop.template run<0, true>(scratch, begin, end);
  }
}

template <class V>
constexpr Kernels<typename V::Real> make_kernels() {
  return {hakd_scores<V>, hakd<V>, segmentation<V>, V::kLanes};
}

}  // namespace hetero::cpu
