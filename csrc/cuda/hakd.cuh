// HeteroAKD at a thread's pixels (csrc/pixel/hakd.h): the unguarded mathematics with a pixel's classes in registers, the
// guarded one, which is rarely needed, from shared memory and without keeping anything.
#pragma once

#include "walk.cuh"

namespace hetero::cuda {

HK_DEVICE void add_over_group(SplitSum<Value>& sum, int lanes) {
  add_over_group(sum.anchor, lanes);
  add_over_group(sum.others, lanes);
}

HK_DEVICE void add_over_group(HakdSums<Value>& sums, int lanes) {
  add_over_group(sums.student, lanes);
  add_over_group(sums.hybrid, lanes);
  add_over_group(sums.weighted, lanes);
  add_over_group(sums.value, lanes);
  add_over_group(sums.weight, lanes);
}

// `Default`: kmm, kem="class", divergence "kl", known to the compiler; `Proj`: L_proj has a gradient; `Single`: a thread
// has all of a pixel's classes; Power: T where that is 1, 2 or 4, else 0.
template <bool Default, int Power, bool Proj, bool Single>
class HakdLoss {
  using V = Value;

 public:
  HK_DEVICE HakdLoss(const HakdProblem& p, const Tile& tile, const Lane& lane, const TileNetwork& student,
                     const TileNetwork& teacher, const float (&scale)[2])
      : p_(p), tile_(tile), lane_(lane), student_(student), teacher_(teacher), reader_(p, tile, lane), terms(p, tile, lane),
        lanes_(Single ? 1 : lane.lanes), first_(Single ? 0 : lane.position(0)),
        parameters_(Default ? HakdParameters<float>{p.temperature, true, Kem::kClass, false} : p.parameters()),
        hakd_scale_(scale[0] * p.temperature), proj_scale_(scale[1] / static_cast<float>(p.classes)) {}

  HK_DEVICE void band(int row, int end, bool bounded) {
    if (bounded) {
      unguarded_band(row, end);
    } else {
      for (; row < end; ++row) guarded_row(row);
    }
  }

 private:
  // Lanes that share pixels and options that are decided as it goes take registers: then the teacher's sums stay in shared
  // memory. So they do on sm_80, where the compiler would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
  static constexpr bool kTeacherInRegisters = false;
#else
  static constexpr bool kTeacherInRegisters = Single && Default;
#endif

  HK_DEVICE int own_classes() const { return Single ? p_.classes : lane_.classes; }

  // Which of the thread's classes class c is, -1 for none.
  HK_DEVICE int own(int c) const { return Single ? c : lane_.own(c); }

  // use(i) for the thread's classes.
  template <class Use>
  HK_DEVICE void each(Use use) const {
#pragma unroll
    for (int i = 0; i < kClassesPerThread; ++i) {
      if (i < own_classes()) use(i);
    }
  }

  HK_DEVICE void unguarded_band(int row, int end) {
    const bool student_gradient = p_.student.gradient, teacher_gradient = Proj && p_.teacher.gradient;
    V upper[kClassesPerThread], lower[kClassesPerThread], teacher_upper[kClassesPerThread], teacher_lower[kClassesPerThread];
    each([&](int i) {
      if (student_gradient) {
        upper[i] = student_.sum(0, i, lane_);
        lower[i] = student_.sum(1, i, lane_);
      }
      if (kTeacherInRegisters && teacher_gradient) {
        teacher_upper[i] = teacher_.sum(0, i, lane_);
        teacher_lower[i] = teacher_.sum(1, i, lane_);
      }
    });
    const float unit = static_cast<float>(math::kLog2e) / p_.temperature;
    for (; row < end; ++row) {
      const Pixel pixel = reader_.at(row);
      if (!__any_sync(kAllLanes, pixel.valid)) {
        terms.record(pixel, row, V(0.f), V(0.f));
        continue;
      }
      const int labelled = own(pixel.label);
      const Corners student = student_.corners(lane_, row, unit), teacher = teacher_.corners(lane_, row, unit);
      HakdClass<V> kept[kClassesPerThread];
      BestClass best;
      each([&](int i) {
        kept[i].student = student.logit(first_ + i);  // the logit, until its exponential takes its place
        best.offer(parameters_.kmm ? kept[i].student : teacher.logit(first_ + i), i);
      });
      const int anchored = anchor_of(best);
      HakdSums<V> sums;
      const V proj(pixel.factor * proj_scale_), below(teacher_.row_part(row)), above(1.f - teacher_.row_part(row));
      const V student_below(student_.row_part(row)), student_above(1.f - student_.row_part(row));
      each([&](int i) {
        const Chosen<V> label{i == labelled}, anchor{i == anchored};
        const V w_t = teacher.logit(first_ + i);
        HakdVisit<V> visit = exponentials<Power>(kept[i].student, w_t, label, anchor, parameters_, sums);
        HakdErrors<V> errors;
        mix<Proj>(visit, label, parameters_, sums, &errors);
        kept[i] = weigh<Power>(visit, w_t, label, anchor, parameters_, V(1.f), sums);
        if constexpr (Proj) {
          const V s = pixel.masked(errors.student * proj), t = pixel.masked(errors.teacher * proj);
          if (student_gradient) {
            upper[i] = fma(student_above, s, upper[i]);
            lower[i] = fma(student_below, s, lower[i]);
          }
          if (!kTeacherInRegisters && teacher_gradient) teacher_.add(row, i, lane_, t);
          if (kTeacherInRegisters && teacher_gradient) {
            teacher_upper[i] = fma(above, t, teacher_upper[i]);
            teacher_lower[i] = fma(below, t, teacher_lower[i]);
          }
        }
      });
      add_over_group(sums, lanes_);
      add_over_group(sums.proj, lanes_);
      to_natural(sums, parameters_);
      const HakdPixel<V> done = finish(
          sums, parameters_, parameters_.cross_entropy ? surprise(sums.student) : surprise_ratio(sums.student, sums.hybrid));
      terms.record(pixel, row, done.loss, sums.proj / V(static_cast<float>(p_.classes)));
      if (!student_gradient) continue;
      const HakdFactors<V> factors = gradient_factors(done, V(pixel.factor * hakd_scale_));
      each([&](int i) {
        const V g = pixel.masked(gradient(kept[i], Chosen<V>{i == anchored}, factors));
        upper[i] = fma(student_above, g, upper[i]);
        lower[i] = fma(student_below, g, lower[i]);
      });
    }
    each([&](int i) {
      if (student_gradient) {
        student_.set_sum(0, i, lane_, upper[i]);
        student_.set_sum(1, i, lane_, lower[i]);
      }
      if (kTeacherInRegisters && teacher_gradient) {
        teacher_.set_sum(0, i, lane_, teacher_upper[i]);
        teacher_.set_sum(1, i, lane_, teacher_lower[i]);
      }
    });
  }

  // Which of the thread's classes the pixel's best one is, -1 for none; `best` names one of the thread's.
  HK_DEVICE int anchor_of(BestClass& best) const {
    if (Single) return best.number;
    best.number = lane_.member + (best.number << lane_.order.shift);
    best.over_group(lanes_);
    return own(best.number);
  }

  HK_DEVICE void guarded_row(int row) {
    const Pixel pixel = reader_.at(row);
    if (!__any_sync(kAllLanes, pixel.valid)) {
      terms.record(pixel, row, V(0.f), V(0.f));
      return;
    }
    const int labelled = own(pixel.label);
    const HakdParameters<float> p = parameters_;
    const Corners student = student_.corners(lane_, row, 1.f), teacher = teacher_.corners(lane_, row, 1.f);
    BestClass best;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) best.offer((p.kmm ? student : teacher).logit(first_ + i), i);
    const int anchored = anchor_of(best);

    HakdSums<V> sums;
    HakdMaxima<V> maxima{V(-INFINITY), V(-INFINITY), V(-INFINITY)};
    const V proj(pixel.factor * proj_scale_);
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      const V z_t = teacher.logit(first_ + i);
      const Chosen<V> label{i == labelled};
      HakdMeasured<V> m;
      HakdErrors<V> errors;
      reliabilities(student.logit(first_ + i), z_t, label, m);
      measure<Proj>(z_t, label, p, m, maxima, sums, &errors);
      if constexpr (Proj) {
        if (p_.student.gradient) student_.add(row, i, lane_, pixel.masked(errors.student * proj));
        if (p_.teacher.gradient) teacher_.add(row, i, lane_, pixel.masked(errors.teacher * proj));
      }
    }
    highest_over_group(maxima.student, lanes_);
    highest_over_group(maxima.hybrid, lanes_);
    highest_over_group(maxima.score, lanes_);
    add_over_group(sums.proj, lanes_);

    HakdAnchor<V> at_anchor;
    const auto visit = [&](int i, HakdSums<V>& into, HakdAnchor<V>& at) {
      const V z_t = teacher.logit(first_ + i);
      const Chosen<V> label{i == labelled}, anchor{i == anchored};
      HakdMeasured<V> m;
      HakdClass<V> kept;
      reliabilities(student.logit(first_ + i), z_t, label, m);
      score(z_t, label, p.kmm, m);
      V highest(0.f), scale(0.f);
      if (p.kem == Kem::kSpatial) {
        const float* spatial = p_.spatial + tile_.image * 2 * p_.classes + lane_.member + i * lanes_;
        highest = V(read(spatial));
        scale = V(read(spatial + p_.classes));
      }
      weigh_student(m, anchor, p, maxima, into, at, kept);
      weigh_hybrid(m, anchor, p, highest, scale, maxima, into, kept);
      return kept;
    };
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) visit(i, sums, at_anchor);
    add_over_group(sums, lanes_);
    add_over_group(at_anchor.z_s, lanes_);
    add_over_group(at_anchor.z_h, lanes_);

    const V cold(1.f / p.temperature);
    V log_ratio = surprise_guarded(sums.student, (maxima.student - at_anchor.z_s) * cold);
    if (!p.cross_entropy) {
      log_ratio = log_ratio - surprise_guarded(sums.hybrid, (maxima.hybrid - at_anchor.z_h) * cold);
    }
    const HakdPixel<V> done = finish(sums, p, log_ratio);
    terms.record(pixel, row, done.loss, sums.proj / V(static_cast<float>(p_.classes)));
    if (!p_.student.gradient) return;
    const HakdFactors<V> factors = gradient_factors(done, V(pixel.factor * hakd_scale_));
    HakdSums<V> unused;
    HakdAnchor<V> nowhere;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      const HakdClass<V> kept = visit(i, unused, nowhere);
      student_.add(row, i, lane_, pixel.masked(gradient(kept, Chosen<V>{i == anchored}, factors)));
    }
  }

  const HakdProblem& p_;
  const Tile& tile_;
  const Lane& lane_;
  const TileNetwork &student_, &teacher_;
  const PixelReader reader_;

 public:
  TermSums terms;

 private:
  const int lanes_, first_;  // first_: position of the thread's first class
  const HakdParameters<float> parameters_;
  const float hakd_scale_, proj_scale_;
};

template <bool Default, int Power, bool Proj, bool Single>
__global__ void __launch_bounds__(128, 2) hakd_kernel(const HakdProblem p) {
  SharedAllocator memory(dynamic_shared_memory());
  const CommonArrays arrays(memory, ClassOrder(p.classes, p.lanes));
  const Tile tile(p);
  const Lane lane(p, tile);
  TileNetwork student(p.student, p, tile, memory, p.student.gradient), teacher(p.teacher, p, tile, memory, p.teacher.gradient);
  const float scale[2] = {p.term[0].weight * p.term[0].share * inverse_divisor(p.term[0], arrays.scratch[0]),
                          p.term[1].weight * p.term[1].share * inverse_divisor(p.term[1], arrays.scratch[1])};
  HakdLoss<Default, Power, Proj, Single> loss(p, tile, lane, student, teacher, scale);
  walk(p, tile, lane, student, &teacher, loss);
  loss.terms.finish(arrays.scratch[0], arrays.scratch[1], arrays.counts);
}

// kem="spatial", first: a tile's highest score m of every class (0 without pixels) and its sum of e^{q - m}. Every thread
// has its own, where the student's gradient has its sums in the main launch.
class HakdScores {
  using V = Value;

 public:
  HK_DEVICE HakdScores(const HakdProblem& p, const Tile& tile, const Lane& lane, const TileNetwork& student,
                       const TileNetwork& teacher, Shared<float> scores)
      : p_(p), tile_(tile), lane_(lane), student_(student), teacher_(teacher), reader_(p, tile, lane), scores_(scores) {
    for (int c = lane.member; lane.inside && c < p.classes; c += lane.lanes) {
      scores_.set(at(0, c, lane.column), 0.f);
      scores_.set(at(1, c, lane.column), 0.f);
    }
  }

  HK_DEVICE void band(int row, int end, bool) {
    for (; row < end; ++row) {
      const Pixel pixel = reader_.at(row);
      const Corners student = student_.corners(lane_, row, 1.f), teacher = teacher_.corners(lane_, row, 1.f);
      const int labelled = lane_.own(pixel.label);
      for (int i = 0; lane_.inside && i < lane_.classes; ++i) {
        const int c = lane_.member + i * lane_.lanes;
        const V z_t = teacher.logit(lane_.position(i));
        const Chosen<V> label{i == labelled};
        HakdMeasured<V> m;
        reliabilities(student.logit(lane_.position(i)), z_t, label, m);
        score(z_t, label, p_.kmm, m);
        V highest(scores_[at(0, c, lane_.column)]), sum(scores_[at(1, c, lane_.column)]);
        add_score(m.score, pixel.valid, highest, sum);
        scores_.set(at(0, c, lane_.column), highest.v);
        scores_.set(at(1, c, lane_.column), sum.v);
      }
    }
  }

  // After a barrier.
  HK_DEVICE void finish() const {
    for (int c = threadIdx.x; c < p_.classes; c += blockDim.x) {
      V highest(0.f), sum(0.f);
      for (int x = 0; x < tile_.columns; ++x) highest = maximum(V(scores_[at(0, c, x)]), highest);
      for (int x = 0; x < tile_.columns; ++x) {
        sum = fma(V(scores_[at(1, c, x)]), math::exp_nonpositive(V(scores_[at(0, c, x)]) - highest), sum);
      }
      float* out = p_.block_scores + tile_.index * 2 * p_.classes + c;
      write(out, highest.v);
      write(out + p_.classes, sum.v);
    }
  }

 private:
  HK_DEVICE int at(int which, int c, int column) const { return (which * p_.classes + c) * tile_.capacity + column; }

  const HakdProblem& p_;
  const Tile& tile_;
  const Lane& lane_;
  const TileNetwork &student_, &teacher_;
  const PixelReader reader_;
  const Shared<float> scores_;
};

HK_KERNEL void __launch_bounds__(128, 4) hakd_scores_kernel(const HakdProblem p) {
  SharedAllocator memory(dynamic_shared_memory());
  const Tile tile(p);
  const Lane lane(p, tile);
  TileNetwork student(p.student, p, tile, memory, false), teacher(p.teacher, p, tile, memory, false);
  HakdScores scores(p, tile, lane, student, teacher, memory.take<float>(2 * p.classes * tile.capacity));
  walk(p, tile, lane, student, &teacher, scores);
  scores.finish();
}

// kem="spatial", second: what an image's scores are measured by. A thread has a class, a block an image's.
HK_KERNEL void __launch_bounds__(128) hakd_combine_scores_kernel(const HakdProblem p) {
  const int blocks_per_image = (p.classes + int(blockDim.x) - 1) / int(blockDim.x);
  const int64_t image = blockIdx.x / blocks_per_image;
  const int c = static_cast<int>(blockIdx.x % blocks_per_image * blockDim.x + threadIdx.x);
  if (c >= p.classes) return;
  const int64_t tiles = p.rows.count * p.columns.count;
  const float* part = p.block_scores + image * tiles * 2 * p.classes + c;
  Value highest(0.f), sum(0.f);
  for (int64_t i = 0; i < tiles; ++i) highest = maximum(Value(read(part + i * 2 * p.classes)), highest);
  for (int64_t i = 0; i < tiles; ++i) {
    const Value m(read(part + i * 2 * p.classes)), s(read(part + (i * 2 + 1) * p.classes));
    sum = fma(s, math::exp_nonpositive(m - highest), sum);
  }
  write(p.spatial + image * 2 * p.classes + c, highest.v);
  write(p.spatial + (image * 2 + 1) * p.classes + c, sum.v == 0.f ? 0.f : 1.f / sum.v);
}

}  // namespace hetero::cuda
