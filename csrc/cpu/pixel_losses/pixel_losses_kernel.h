// The pixel losses on the walk of walk.h; what happens at a pixel is in csrc/pixel/. Included by one translation unit per
// instruction set.
#pragma once

#include <type_traits>

#include "../core/pair.h"
#include "normalization.h"
#include "walk.h"

namespace hetero::cpu {

// A network's best class of each pixel of a vector. Where logits are bounded it may be one of several within 0.1 % of the
// best: the class's number takes the place of the logit's last bits, so that one maximum finds both.
template <class V>
HK_INLINE void best_classes(const TileRow<V>& network, int64_t classes, int x, bool bounded, int32_t* best) {
  using Real = typename V::Real;
  if constexpr (std::is_same_v<Real, float>) {
    if (bounded && classes <= kMaxTag) {
      V highest = with_tag(network.logit(0, x), 0);
      for (int64_t c = 1; c < classes; ++c) {
        highest = maximum(with_tag(network.logit(c, x), static_cast<int32_t>(c)), highest);
      }
      return tags(highest, best);
    }
  }
  V highest(-INFINITY), index(Real(0));
  for (int64_t c = 0; c < classes; ++c) {
    const V z = network.logit(c, x);
    index = select(z > highest, V(static_cast<Real>(c)), index);
    highest = maximum(z, highest);
  }
  alignas(64) Real lanes[V::kLanes];
  index.store(lanes);
  for (int i = 0; i < V::kLanes; ++i) best[i] = static_cast<int32_t>(lanes[i]);
}

// hakd ---------------------------------------------------------------------------------------------------------

constexpr int kChunk = 8;  // classes that take a step before the next one begins

template <class V>
struct HakdLoop {
  using Real = typename V::Real;
  const HakdProblem<Real>& problem;
  // [K]; the errors and what the guarded visit measured only where they are wanted.
  HakdClass<V>* kept;
  HakdErrors<V>* errors;
  HakdMeasured<V>* measured;

  HK_INLINE V per_class(const Real* values, int64_t image, int64_t c) const {
    return V(values[image * problem.classes + c]);
  }

  template <int Power, bool Errors>
  HK_INLINE HakdPixel<V> unguarded(int64_t image, int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors,
                                   const TileRow<V>& student_row, const TileRow<V>& teacher_row, HakdSums<V>& out) const {
    // Copies, so that no store can be taken for one of theirs and they stay in registers.
    const HakdParameters<Real> p = problem.parameters;
    const TileRow<V> student = student_row, teacher = teacher_row;
    HakdClass<V>* const kept = this->kept;
    HakdErrors<V>* const errors = this->errors;
    const int64_t classes = problem.classes;
    HakdSums<V> sums;
    const bool spatial = p.kem == Kem::kSpatial;
    HakdVisit<V> visits[kChunk];
    for (int64_t first = 0; first < classes; first += kChunk) {
      const int64_t end = first + kChunk < classes ? first + kChunk : classes;
      pixels.labels.each(first, end, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
        visits[c - first] = exponentials<Power>(student.logit(c, x), teacher.logit(c, x), label, anchors.at(c), p, sums);
      });
      if constexpr (Errors) {
        pixels.labels.each(first, end, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
          mix<true>(visits[c - first], label, p, sums, errors + c);
        });
      } else {
        for (int64_t c = first; c < end; ++c) mix<false>(visits[c - first], NotChosen<V>(), p, sums, errors);
      }
      pixels.labels.each(first, end, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
        const V scale = spatial ? per_class(problem.spatial_scale_unguarded, image, c) : V(Real(1));
        const V w_t = p.kmm ? V(Real(0)) : teacher.logit(c, x);
        kept[c] = weigh<Power>(visits[c - first], w_t, label, anchors.at(c), p, scale, sums);
      });
    }
    to_natural(sums, p);
    out = sums;
    return finish(sums, p, p.cross_entropy ? surprise(sums.student) : surprise_ratio(sums.student, sums.hybrid));
  }

  template <bool Errors>
  HK_NOINLINE HakdPixel<V> guarded(int64_t image, int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors,
                                   const TileRow<V>& student_row, const TileRow<V>& teacher_row, HakdSums<V>& out) const {
    const HakdParameters<Real> p = problem.parameters;
    const TileRow<V> student = student_row, teacher = teacher_row;
    HakdClass<V>* const kept = this->kept;
    HakdErrors<V>* const errors = this->errors;
    HakdMeasured<V>* const measured = this->measured;
    const int64_t classes = problem.classes;
    HakdSums<V> sums;
    const bool spatial = p.kem == Kem::kSpatial;
    const V lowest(-INFINITY), zero(Real(0));
    HakdMaxima<V> maxima{lowest, lowest, lowest};
    for (int64_t first = 0; first < classes; first += kChunk) {
      const int64_t end = first + kChunk < classes ? first + kChunk : classes;
      for (int64_t c = first; c < end; ++c) {
        reliabilities(student.logit(c, x), teacher.logit(c, x), pixels.labels.at(c), measured[c]);
      }
      for (int64_t c = first; c < end; ++c) {
        measure<Errors>(teacher.logit(c, x), pixels.labels.at(c), p, measured[c], maxima, sums, errors + c);
      }
    }
    for (int64_t c = 0; c < classes; ++c) weigh_student(measured[c], anchors.at(c), p, maxima, sums, kept[c]);
    for (int64_t c = 0; c < classes; ++c) {
      const V maximum = spatial ? per_class(problem.spatial_maximum, image, c) : zero;
      const V scale = spatial ? per_class(problem.spatial_scale, image, c) : zero;
      weigh_hybrid(measured[c], anchors.at(c), p, maximum, scale, maxima, sums, kept[c]);
    }
    out = sums;
    return finish(sums, p, log_ratio_guarded(sums, p));
  }

  template <bool Errors>
  HK_INLINE void gradients(int x, const Pixels<V>& pixels, const ClassPerPixel<V>& anchors, const HakdPixel<V>& pixel,
                           const TileRow<V>& student_row, const TileRow<V>& teacher_row) const {
    const TileRow<V> student = student_row, teacher = teacher_row;
    const HakdClass<V>* const kept = this->kept;
    const HakdErrors<V>* const errors = this->errors;
    const int64_t classes = problem.classes;
    const V hakd = pixels.factor * V(problem.coefficient[0] * problem.parameters.temperature);
    const V proj = pixels.factor * V(problem.coefficient[1] / static_cast<Real>(problem.classes));
    const HakdFactors<V> factors = gradient_factors(pixel, hakd);
    for (int64_t c = 0; c < classes; ++c) {
      if (student.gradient) {
        V g = gradient(kept[c], anchors.at(c), factors);
        if constexpr (Errors) g = fma(errors[c].student, proj, g);
        student.add(c, x, pixels.masked(g));
      }
      if constexpr (Errors) {
        if (teacher.gradient) teacher.add(c, x, pixels.masked(errors[c].teacher * proj));
      }
    }
  }

  // A vector of pixels, from logits to terms and gradients.
  template <int Power, bool Errors>
  void pixel(int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels, const TileRow<V>& student,
             const TileRow<V>& teacher, bool bounded, RowBuffers<V>& buffers) const {
    HakdSums<V> sums;
    alignas(64) int32_t best[V::kLanes];
    best_classes(problem.parameters.kmm ? student : teacher, problem.classes, x, bounded, best);
    const ClassPerPixel<V> anchors(best);
    const HakdPixel<V> pixel = bounded ? unguarded<Power, Errors>(image, x, pixels, anchors, student, teacher, sums)
                                       : guarded<Errors>(image, x, pixels, anchors, student, teacher, sums);
    const V share(Real(1) / static_cast<Real>(problem.classes));
    buffers.record(image, row, x0, x, n, pixels.masked(pixel.loss), pixels.masked(sums.proj * share));
    if (student.gradient || teacher.gradient) gradients<Errors>(x, pixels, anchors, pixel, student, teacher);
  }

  // use.template operator()<Power, Errors>() with the loop's temperature and whether L_proj has a gradient.
  template <class Use>
  void specialise(bool gradient, Use use) const {
    const double temperature = problem.parameters.temperature;
    const bool errors = gradient && problem.coefficient[1] != 0;
    const auto with_power = [&]<int Power>() {
      errors ? use.template operator()<Power, true>() : use.template operator()<Power, false>();
    };
    if (temperature == 1) {
      with_power.template operator()<1>();
    } else if (temperature == 2) {
      with_power.template operator()<2>();
    } else if (temperature == 4) {
      with_power.template operator()<4>();
    } else {
      with_power.template operator()<0>();
    }
  }
};

// A loop with room for its scratch of hakd_bytes.
template <class V>
HakdLoop<V> make_hakd_loop(const HakdProblem<typename V::Real>& problem, Scratch& scratch) {
  const auto take = [&](int64_t bytes) { return scratch.take(problem.classes * bytes); };
  return {problem, static_cast<HakdClass<V>*>(take(sizeof(HakdClass<V>))),
          static_cast<HakdErrors<V>*>(take(sizeof(HakdErrors<V>))),
          static_cast<HakdMeasured<V>*>(take(sizeof(HakdMeasured<V>)))};
}

template <class V>
int64_t hakd_bytes(int64_t classes) {
  return classes * int64_t(sizeof(HakdClass<V>) + sizeof(HakdErrors<V>) + sizeof(HakdMeasured<V>)) + 3 * 64;
}

template <class V>
void hakd(const HakdProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  Scratch scratch(walk_bytes<V>(problem) + hakd_bytes<V>(problem.classes));
  const HakdLoop<V> loop = make_hakd_loop<V>(problem, scratch);
  loop.specialise(problem.student.gradient || problem.teacher.gradient, [&]<int Power, bool Errors>() {
    walk<V>(
        problem, scratch, begin, end,
        [&](auto&&... arguments) { loop.template pixel<Power, Errors>(arguments...); }, [](int64_t) {});
  });
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
  HakdErrors<V>* const no_errors = nullptr;
  bool guarded = false;  // once in a block: from there on its sums are measured from the maxima, not from 0
  const auto clear = [&] {
    guarded = false;
    for (int64_t c = 0; c < problem.classes; ++c) {
      maxima[c] = lowest;
      sums[c] = zero;
    }
  };
  clear();
  const HakdParameters<Real> p = problem.parameters;
  const int64_t classes = problem.classes;
  walk<V>(
      problem, scratch, begin, end,
      [&](int64_t, int64_t, int64_t, int x, int, const Pixels<V>& pixels, const TileRow<V>& student_row,
          const TileRow<V>& teacher_row, bool bounded, RowBuffers<V>&) {
        const TileRow<V> student = student_row, teacher = teacher_row;
        guarded = guarded || !bounded;
        HakdVisit<V> visits[kChunk];
        HakdSums<V> unused;
        for (int64_t first = 0; bounded && first < classes; first += kChunk) {
          const int64_t end = first + kChunk < classes ? first + kChunk : classes;
          pixels.labels.each(first, end, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
            visits[c - first] =
                exponentials<0>(student.logit(c, x), teacher.logit(c, x), label, pixels.labels.at(c), p, unused);
          });
          for (int64_t c = first; c < end; ++c) mix<false>(visits[c - first], NotChosen<V>(), p, unused, no_errors);
          pixels.labels.each(first, end, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
            V e = spatial_score(visits[c - first], teacher.logit(c, x), label, p);
            if (guarded) e = e * math::exp_nonpositive(-maximum(maxima[c], zero));
            sums[c] = sums[c] + pixels.masked(e);
          });
        }
        for (int64_t c = 0; !bounded && c < classes; ++c) {
          const V z_t = teacher.logit(c, x);
          HakdMeasured<V> m;
          reliabilities(student.logit(c, x), z_t, pixels.labels.at(c), m);
          score(z_t, pixels.labels.at(c), p.kmm, m);
          add_score(m.score, pixels.valid, maxima[c], sums[c]);
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

  template <int Power, bool Teacher, bool Guarded, bool Smooth>
  HK_INLINE void pixel(int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels,
                       const TileRow<V>& student_row, const TileRow<V>& teacher_row, RowBuffers<V>& buffers) const {
    // Copies, so that no store can be taken for one of theirs and they stay in registers.
    const SegmentationParameters<Real> p = problem.parameters;
    const TileRow<V> student = student_row, teacher = teacher_row;
    SegmentationClass<V>* const kept = this->kept;
    const Real* const class_weight = problem.class_weight;
    const int64_t classes = problem.classes;
    const auto student_logit = [&](int64_t c) { return student.logit(c, x); };
    const auto teacher_logit = [&](int64_t c) { return Teacher ? teacher.logit(c, x) : V(Real(0)); };

    SegmentationMaxima<V> maxima;
    if constexpr (Guarded) {
      maxima.student = maxima.teacher = V(-INFINITY);
      for (int64_t c = 0; c < classes; ++c) {
        maxima.student = maximum(student_logit(c), maxima.student);
        if constexpr (Teacher) maxima.teacher = maximum(teacher_logit(c), maxima.teacher);
      }
    }
    alignas(64) int32_t best[V::kLanes];
    if constexpr (Teacher) best_classes(teacher, classes, x, !Guarded, best);
    const ClassPerPixel<V> anchors = Teacher ? ClassPerPixel<V>(best) : pixels.labels;
    V o_label(Real(0));
    if constexpr (Guarded || Smooth) o_label = pixels.labels.pick(student_logit);

    SegmentationSums<V> sums;
    pixels.labels.each(0, classes, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
      kept[c] = visit<Power, Teacher, Guarded, Smooth>(student_logit(c), teacher_logit(c), label, anchors.at(c),
                                                       V(class_weight[c]), o_label, p, maxima, sums);
    });
    if constexpr (!Guarded) to_natural(sums, p);
    const V label_weight = pixels.labels.pick([&](int c) { return V(class_weight[c]); });
    const SegmentationPixel<V> done =
        finish<Teacher, Guarded>(sums, p, o_label, label_weight, pixels.factor * V(problem.coefficient[0]),
                                 pixels.factor * V(problem.coefficient[1]), maxima);
    buffers.record(image, row, x0, x, n, pixels.masked(done.task), pixels.masked(done.kd));
    if (!student.gradient) return;
    pixels.labels.each(0, classes, [&](int64_t c, auto label) HK_INLINE_LAMBDA {
      const V g = gradient<Power, Teacher, Smooth>(kept[c], done, label, anchors.at(c), V(class_weight[c]));
      student.add(c, x, pixels.masked(g));
    });
  }

  template <int Power, bool Teacher, bool Smooth>
  void run(Scratch& scratch, int64_t begin, int64_t end) const {
    walk<V>(
        problem, scratch, begin, end,
        [&](int64_t image, int64_t row, int64_t x0, int x, int n, const Pixels<V>& pixels, const TileRow<V>& student,
            const TileRow<V>& teacher, bool bounded, RowBuffers<V>& buffers) {
          if (bounded) {
            pixel<Power, Teacher, false, Smooth>(image, row, x0, x, n, pixels, student, teacher, buffers);
          } else {
            pixel<0, Teacher, true, Smooth>(image, row, x0, x, n, pixels, student, teacher, buffers);
          }
        },
        [](int64_t) {});
  }

  template <int Power, bool Teacher>
  void run_smooth(Scratch& scratch, int64_t begin, int64_t end) const {
    problem.parameters.smoothing != 0 ? run<Power, Teacher, true>(scratch, begin, end)
                                      : run<Power, Teacher, false>(scratch, begin, end);
  }
};

template <class V>
void segmentation(const SegmentationProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  const int64_t bytes = problem.classes * int64_t(sizeof(SegmentationClass<V>));
  Scratch scratch(walk_bytes<V>(problem) + bytes + 64);
  const SegmentationLoop<V> loop{problem, static_cast<SegmentationClass<V>*>(scratch.take(bytes))};
  const double temperature = problem.parameters.temperature;
  if (!problem.has_teacher) {
    loop.template run_smooth<1, false>(scratch, begin, end);
  } else if (temperature == 1) {
    loop.template run_smooth<1, true>(scratch, begin, end);
  } else if (temperature == 2) {
    loop.template run_smooth<2, true>(scratch, begin, end);
  } else if (temperature == 4) {
    loop.template run_smooth<4, true>(scratch, begin, end);
  } else {
    loop.template run_smooth<0, true>(scratch, begin, end);
  }
}

template <class V>
constexpr Kernels<typename V::Real> make_kernels() {
  return {hakd_scores<V>, hakd<V>, segmentation<V>, summarize_labels<typename V::Real>,
          normalize_gradient<typename V::Part>, V::kLanes};
}

}  // namespace hetero::cpu
