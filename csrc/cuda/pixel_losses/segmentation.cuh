// Cross-entropy and logit distillation at a thread's pixels (csrc/pixel/segmentation.h), as hakd.cuh.
#pragma once

#include "hakd.cuh"

namespace hetero::cuda {

template <bool Teacher>
HK_DEVICE void add_over_group(SegmentationSums<Value>& sums, int lanes) {
  add_over_group(sums.student, lanes);
  add_over_group(sums.smoothed, lanes);
  if constexpr (Teacher) {
    add_over_group(sums.tempered, lanes);
    add_over_group(sums.teacher, lanes);
    add_over_group(sums.value, lanes);
  }
}

// `Smooth`: there may be label smoothing; Power: T where that is 1, else 0; `Single`: a thread has all of a pixel's classes.
template <bool Teacher, int Power, bool Smooth, bool Single>
class SegmentationLoss {
  using V = Value;

 public:
  static constexpr int kStagedAtOnce = 4;

  HK_DEVICE SegmentationLoss(const SegmentationProblem& p, const Tile& tile, const Lane& lane, const TileNetwork& student,
                             const TileNetwork* teacher, const BandLabels& labels, Shared<float> class_weight, float weight_sum,
                             const float (&scale)[2])
      : p_(p), lane_(lane), student_(student), teacher_(teacher), class_weight_(class_weight), reader_(p, tile, lane, labels),
        terms(p, tile, lane), lanes_(Single ? 1 : lane.lanes), first_(Single ? 0 : lane.position(0)),
        parameters_{p.temperature, Smooth ? p.smoothing : 0.f,
                    Smooth ? p.smoothing / static_cast<float>(p.classes) : 0.f, weight_sum},
        task_scale_(scale[0]), kd_scale_(scale[1]) {}

  HK_DEVICE void band(int row, int end, bool bounded) {
    if (bounded) {
      unguarded_band(row, end);
    } else {
      for (; row < end; ++row) guarded_row(row);
    }
  }

 private:
  HK_DEVICE int own_classes() const { return Single ? p_.classes : lane_.classes; }

  // Which of the thread's classes class c is, -1 for none.
  HK_DEVICE int own(int c) const { return Single ? c : lane_.own(c); }

  template <class Use>
  HK_DEVICE void each(Use use) const {
#pragma unroll
    for (int i = 0; i < kClassesPerThread; ++i) {
      if (i < own_classes()) use(i);
    }
  }

  // The same, and as many classes without mass as make whole groups (tiles.h).
  template <class Use>
  HK_DEVICE void each_of_groups(Use use) const {
#pragma unroll
    for (int first = 0; first < kClassesPerThread; first += kClassGroup) {
      if (first >= own_classes()) continue;
#pragma unroll
      for (int i = first; i < first + kClassGroup; ++i) use(i);
    }
  }

  // Class weights lie as the classes do.
  HK_DEVICE V weight(int i) const { return V(Smooth ? class_weight_[first_ + i] : 1.f); }

  HK_DEVICE int label_position(const Pixel& pixel) const { return lane_.order.position(pixel.valid ? pixel.label : 0); }
  HK_DEVICE V label_weight(const Pixel& pixel) const { return V(class_weight_[label_position(pixel)]); }

  // From the best of the thread's classes.
  HK_DEVICE void best_of_pixel(BestClass& best) const {
    if (Single) return;
    best.number = lane_.member + (best.number << lane_.order.shift);
    best.over_group(lanes_);
  }

  HK_DEVICE void unguarded_band(int row, int end) {
    const bool wanted = p_.student.gradient;
    V upper[kClassesPerThread] = {}, lower[kClassesPerThread] = {};
    each([&](int i) {
      if (!wanted) return;
      upper[i] = student_.sum(0, i, lane_);
      lower[i] = student_.sum(1, i, lane_);
    });
    const float unit = static_cast<float>(math::kLog2e) / p_.temperature;
    const SegmentationMaxima<V> maxima;
    for (; row < end; ++row) {
      const Pixel pixel = reader_.at(row);
      if (!__any_sync(kAllLanes, pixel.valid)) {
        terms.record(pixel, row, V(0.f), V(0.f));
        continue;
      }
      const int labelled = own(pixel.label);
      const Corners student = student_.corners(lane_, row, unit);
      const Corners teacher = Teacher ? teacher_->corners(lane_, row, unit) : student;
      SegmentationClass<V> kept[kClassesPerThread];
      BestClass best;
      if constexpr (Teacher) {
        each_of_groups([&](int i) {
          kept[i].teacher = teacher.logit(first_ + i);  // the logit, until its exponential takes its place
          best.offer(kept[i].teacher, i);
        });
        best_of_pixel(best);
      }
      const int anchored = own(best.number);
      V o_label(0.f);
      if constexpr (Smooth) o_label = student.logit(label_position(pixel));
      SegmentationSums<V> sums;
      each_of_groups([&](int i) {
        const Chosen<V> label{i == labelled}, anchor{i == anchored};
        V o_t(0.f);
        if constexpr (Teacher) o_t = kept[i].teacher;
        kept[i] = visit<Power, Teacher, false, Smooth>(student.logit(first_ + i), o_t, label, anchor, weight(i), o_label,
                                                       parameters_, maxima, sums);
      });
      add_over_group<Teacher>(sums, lanes_);
      to_natural(sums, parameters_);
      const SegmentationPixel<V> done =
          finish<Teacher, false>(sums, parameters_, o_label, label_weight(pixel), V(pixel.factor * task_scale_),
                                 V(pixel.factor * kd_scale_), maxima);
      terms.record(pixel, row, done.task, done.kd);
      if (!wanted) continue;
      const V below(student_.row_part(row)), above(1.f - student_.row_part(row));
      each_of_groups([&](int i) {
        const Chosen<V> label{i == labelled}, anchor{i == anchored};
        const V g = pixel.masked(gradient<Power, Teacher, Smooth>(kept[i], done, label, anchor, weight(i)));
        upper[i] = fma(above, g, upper[i]);
        lower[i] = fma(below, g, lower[i]);
      });
    }
    each([&](int i) {
      if (!wanted) return;
      student_.set_sum(0, i, lane_, upper[i]);
      student_.set_sum(1, i, lane_, lower[i]);
    });
  }

  HK_DEVICE void guarded_row(int row) {
    const Pixel pixel = reader_.at(row);
    if (!__any_sync(kAllLanes, pixel.valid)) {
      terms.record(pixel, row, V(0.f), V(0.f));
      return;
    }
    const int labelled = own(pixel.label);
    const NaturalCorners student = student_.natural_corners(lane_, row);
    const NaturalCorners teacher = Teacher ? teacher_->natural_corners(lane_, row) : student;
    SegmentationMaxima<V> maxima;
    maxima.student = maxima.teacher = V(-INFINITY);
    BestClass best;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      maxima.student = maximum(student.logit(first_ + i), maxima.student);
      if constexpr (Teacher) best.offer(teacher.logit(first_ + i), i);
    }
    highest_over_group(maxima.student, lanes_);
    best_of_pixel(best);
    const int anchored = own(best.number);
    maxima.teacher = best.highest;
    const V o_label = student.logit(label_position(pixel));
    SegmentationSums<V> sums, unused;
    const auto visit_class = [&](int i, SegmentationSums<V>& into) {
      const Chosen<V> label{i == labelled}, anchor{i == anchored};
      return visit<0, Teacher, true, Smooth>(student.logit(first_ + i), Teacher ? teacher.logit(first_ + i) : V(0.f), label, anchor, weight(i),
                                             o_label, parameters_, maxima, into);
    };
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) visit_class(i, sums);
    add_over_group<Teacher>(sums, lanes_);
    const SegmentationPixel<V> done =
        finish<Teacher, true>(sums, parameters_, o_label, label_weight(pixel), V(pixel.factor * task_scale_),
                              V(pixel.factor * kd_scale_), maxima);
    terms.record(pixel, row, done.task, done.kd);
    if (!p_.student.gradient) return;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      const Chosen<V> label{i == labelled}, anchor{i == anchored};
      const V g = pixel.masked(gradient<0, Teacher, Smooth>(visit_class(i, unused), done, label, anchor, weight(i)));
      student_.add(row, i, lane_, g);
    }
  }

  const SegmentationProblem& p_;
  const Lane& lane_;
  const TileNetwork& student_;
  const TileNetwork* teacher_;
  const Shared<float> class_weight_;
  const PixelReader reader_;

 public:
  TermSums terms;

 private:
  const int lanes_, first_;  // first_: position of the thread's first class
  const SegmentationParameters<float> parameters_;
  const float task_scale_, kd_scale_;
};

template <bool Teacher, int Power, bool Smooth, bool Single>
__global__ void __launch_bounds__(128, 2) segmentation_kernel(const SegmentationProblem p) {
  SharedAllocator memory(dynamic_shared_memory());
  const CommonArrays arrays(memory, ClassOrder(p.classes, p.lanes));
  const Tile tile(p);
  const Lane lane(p, tile);
  const BandLabels labels(p, tile, memory);
  TileNetwork student(p.student, p, tile, memory, p.student.gradient);
  float weight_sum = 0.f;
  for (int c = threadIdx.x; c < lane.order.filled; c += blockDim.x) {
    const float weight = c >= p.classes ? 0.f : p.class_weight ? read(p.class_weight + c) : 1.f;
    arrays.per_class.set(lane.order.position(c), weight);
    weight_sum += weight;
  }
  weight_sum = sum_over_block(weight_sum, arrays.scratch[2]);
  const float scale[2] = {p.term[0].weight * p.term[0].share * inverse_divisor(p.term[0], arrays.scratch[0]),
                          p.term[1].weight * p.term[1].share * inverse_divisor(p.term[1], arrays.scratch[1])};
  if constexpr (Teacher) {
    TileNetwork teacher(p.teacher, p, tile, memory, false);
    SegmentationLoss<Teacher, Power, Smooth, Single> loss(p, tile, lane, student, &teacher, labels, arrays.per_class, weight_sum, scale);
    walk(p, tile, lane, labels, student, &teacher, loss);
    loss.terms.finish(arrays.scratch[0], arrays.scratch[1], arrays.counts);
  } else {
    SegmentationLoss<Teacher, Power, Smooth, Single> loss(p, tile, lane, student, nullptr, labels, arrays.per_class, weight_sum, scale);
    walk(p, tile, lane, labels, student, nullptr, loss);
    loss.terms.finish(arrays.scratch[0], arrays.scratch[1], arrays.counts);
  }
}

}  // namespace hetero::cuda
