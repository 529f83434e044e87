// HeteroAKD at a thread's pixels of a tile (hakd_pixel.cuh), logits interpolated from shared memory.
#pragma once

#include "walk.cuh"

namespace hetero::cuda {

// Template arguments as HakdPixelLoss has them.
template <bool Default, int Power, bool Proj, bool Single>
class HakdLoss {
  using V = Value;

 public:
  static constexpr int kStagedAtOnce = Proj ? 2 : 4;  // as registers allow

  HK_DEVICE HakdLoss(const HakdProblem& p, const Tile& tile, const Lane& lane, const TileNetwork& student,
                     const TileNetwork& teacher, const BandLabels& labels, const float (&scale)[2])
      : p_(p), tile_(tile), lane_(lane), student_(student), teacher_(teacher), reader_(p, tile, lane, labels), terms(p, tile, lane),
        loss_(p, lane, scale), first_(Single ? 0 : lane.position(0)) {}

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

  HK_DEVICE void unguarded_band(int row, int end) {
    const bool student_gradient = p_.student.gradient, teacher_gradient = Proj && p_.teacher.gradient;
    V upper[kClassesPerThread] = {}, lower[kClassesPerThread] = {};
    V teacher_upper[kClassesPerThread] = {}, teacher_lower[kClassesPerThread] = {};
    loss_.each([&](int i) {
      if (student_gradient) {
        upper[i] = student_.sum(0, i, lane_);
        lower[i] = student_.sum(1, i, lane_);
      }
      if (kTeacherInRegisters && teacher_gradient) {
        teacher_upper[i] = teacher_.sum(0, i, lane_);
        teacher_lower[i] = teacher_.sum(1, i, lane_);
      }
    });
    const float unit = loss_.unit();
    for (; row < end; ++row) {
      const Pixel pixel = reader_.at(row);
      if (!__any_sync(kAllLanes, pixel.valid)) {
        terms.record(pixel, row, V(0.f), V(0.f));
        continue;
      }
      const Corners student = student_.corners(lane_, row, unit), teacher = teacher_.corners(lane_, row, unit);
      const V below(teacher_.row_part(row)), above(1.f - teacher_.row_part(row));
      const V student_below(student_.row_part(row)), student_above(1.f - student_.row_part(row));
      const auto add_to_student = [&](int i, V g) {
        upper[i] = fma(student_above, g, upper[i]);
        lower[i] = fma(student_below, g, lower[i]);
      };
      loss_.unguarded(
          pixel, student_gradient, [&](int i) { return student.logit(first_ + i); },
          [&](int i) { return teacher.logit(first_ + i); },
          [&](int i, V s, V t) {
            if (student_gradient) add_to_student(i, s);
            if (!kTeacherInRegisters && teacher_gradient && i < loss_.own_classes()) teacher_.add(row, i, lane_, t);
            if (kTeacherInRegisters && teacher_gradient) {
              teacher_upper[i] = fma(above, t, teacher_upper[i]);
              teacher_lower[i] = fma(below, t, teacher_lower[i]);
            }
          },
          [&](V hakd, V proj) { terms.record(pixel, row, hakd, proj); }, add_to_student);
    }
    loss_.each([&](int i) {
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

  HK_DEVICE void guarded_row(int row) {
    const Pixel pixel = reader_.at(row);
    if (!__any_sync(kAllLanes, pixel.valid)) {
      terms.record(pixel, row, V(0.f), V(0.f));
      return;
    }
    const NaturalCorners student = student_.natural_corners(lane_, row), teacher = teacher_.natural_corners(lane_, row);
    loss_.guarded(
        pixel, tile_.image, p_.student.gradient, [&](int i) { return student.logit(first_ + i); },
        [&](int i) { return teacher.logit(first_ + i); },
        [&](int i, V s, V t) {
          if (p_.student.gradient) student_.add(row, i, lane_, s);
          if (p_.teacher.gradient) teacher_.add(row, i, lane_, t);
        },
        [&](V hakd, V proj) { terms.record(pixel, row, hakd, proj); }, [&](int i, V g) { student_.add(row, i, lane_, g); });
  }

  const HakdProblem& p_;
  const Tile& tile_;
  const Lane& lane_;
  const TileNetwork &student_, &teacher_;
  const PixelReader reader_;

 public:
  TermSums terms;

 private:
  const HakdPixelLoss<Default, Power, Proj, Single, kClassesPerThread, kClassGroup> loss_;
  const int first_;  // position of the thread's first class
};

template <bool Default, int Power, bool Proj, bool Single>
__global__ void __launch_bounds__(128, 2) hakd_kernel(const HakdProblem p) {
  SharedAllocator memory(dynamic_shared_memory());
  const CommonArrays arrays(memory, ClassOrder(p.classes, p.lanes));
  const Tile tile(p);
  const Lane lane(p, tile);
  const BandLabels labels(p, tile, memory);
  TileNetwork student(p.student, p, tile, memory, p.student.gradient), teacher(p.teacher, p, tile, memory, p.teacher.gradient);
  // The second is L_proj's; without it nobody reads a divisor that nobody counted.
  const float scale[2] = {p.term[0].weight * p.term[0].share * inverse_divisor(p.term[0], arrays.scratch[0]),
                          Proj ? p.term[1].weight * p.term[1].share * inverse_divisor(p.term[1], arrays.scratch[1]) : 0.f};
  HakdLoss<Default, Power, Proj, Single> loss(p, tile, lane, student, teacher, labels, scale);
  walk(p, tile, lane, labels, student, &teacher, loss);
  loss.terms.finish(arrays.scratch[0], arrays.scratch[1], arrays.counts);
}

// kem="spatial", first: a tile's highest score m of every class (0 without pixels) and its sum of e^{q - m}. Every thread
// has its own, where the student's gradient has its sums in the main launch.
class HakdScores {
  using V = Value;

 public:
  static constexpr int kStagedAtOnce = 2;

  HK_DEVICE HakdScores(const HakdProblem& p, const Tile& tile, const Lane& lane, const TileNetwork& student,
                       const TileNetwork& teacher, const BandLabels& labels, Shared<float> scores)
      : p_(p), tile_(tile), lane_(lane), student_(student), teacher_(teacher), reader_(p, tile, lane, labels), scores_(scores) {
    for (int c = lane.member; lane.inside && c < p.classes; c += lane.lanes) {
      scores_.set(at(0, c, lane.column), 0.f);
      scores_.set(at(1, c, lane.column), 0.f);
    }
  }

  HK_DEVICE void band(int row, int end, bool) {
    for (; row < end; ++row) {
      const Pixel pixel = reader_.at(row);
      const NaturalCorners student = student_.natural_corners(lane_, row), teacher = teacher_.natural_corners(lane_, row);
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
  const BandLabels labels(p, tile, memory);
  TileNetwork student(p.student, p, tile, memory, false), teacher(p.teacher, p, tile, memory, false);
  HakdScores scores(p, tile, lane, student, teacher, labels, memory.take<float>(2 * p.classes * tile.capacity));
  walk(p, tile, lane, labels, student, &teacher, scores);
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
