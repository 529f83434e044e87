// HeteroAKD at one pixel (csrc/pixel/hakd.h), by a thread or by the lanes that share the pixel: the unguarded mathematics
// with the classes in registers, the guarded one, which is rarely needed, without keeping anything.
#pragma once

#include "../core/collectives.cuh"
#include "problem.cuh"

namespace hetero::cuda {

// A pixel's label, and what follows from it.
struct Pixel {
  int label;  // -1 where the pixel does not count
  bool valid, wrong;
  float factor;  // of its gradient

  HK_DEVICE Value masked(Value x) const { return select(valid, x, Value(0.f)); }

  // A label's class, or what it is else.
  static constexpr int kIgnored = -1, kWrong = -2;
  HK_DEVICE static int class_of(const Problem& p, int64_t label) {
    return label == p.labels.ignore_index ? kIgnored : label >= 0 && label < p.classes ? static_cast<int>(label) : kWrong;
  }

  // `known`: class_of its label.
  HK_DEVICE static Pixel make(int known, bool inside, float factor) {
    const bool valid = inside && known >= 0;
    return {valid ? known : -1, valid, inside && known == kWrong, factor};
  }
};

// Lanes that share a pixel: class i of lane `member` is the pixel's class member + i lanes.
struct ClassShare {
  int shift, lanes, member, classes;  // lanes = 1 << shift; `classes`: how many the lane has

  HK_DEVICE ClassShare(int all, int order, int thread) : shift(order), lanes(1 << order), member(thread & ((1 << order) - 1)) {
    classes = (all - member + lanes - 1) >> shift;
  }
  HK_DEVICE int number(int i) const { return member + (i << shift); }
  // Which of the lane's classes class c is; -1: none.
  HK_DEVICE int own(int c) const { return c >= 0 && (c & (lanes - 1)) == member ? c >> shift : -1; }
};

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
// has all of a pixel's classes; Power: T where that is 1, 2 or 4, else 0; Most: classes that a thread may have; Group: how many
// the unguarded mathematics takes at once, the last group filled up with classes without mass (tiles.h).
//
// Both functions call student(i), teacher(i) for the logits of the thread's class i; errors(i, s, t) with L_proj's gradients;
// record(hakd, proj) with the pixel's terms; gradient(i, g) with L_hakd's gradient where `wanted`.
template <bool Default, int Power, bool Proj, bool Single, int Most, int Group = 1>
class HakdPixelLoss {
  using V = Value;

 public:
  HK_DEVICE HakdPixelLoss(const HakdProblem& p, const ClassShare& share, const float (&scale)[2])
      : p_(p), share_(share), lanes_(Single ? 1 : share.lanes),
        parameters_(Default ? HakdParameters<float>{p.temperature, true, Kem::kClass, false} : p.parameters()),
        hakd_scale_(scale[0] * p.temperature), proj_scale_(scale[1] / static_cast<float>(p.classes)) {}

  HK_DEVICE int own_classes() const { return Single ? p_.classes : share_.classes; }

  // use(i) for the thread's classes.
  template <class Use>
  HK_DEVICE void each(Use use) const {
#pragma unroll
    for (int i = 0; i < Most; ++i) {
      if (i < own_classes()) use(i);
    }
  }

  // The same in whole groups of `Size`, under one condition each.
  template <int Size, class Use>
  HK_DEVICE void each_of_groups(Use use) const {
#pragma unroll
    for (int first = 0; first < Most; first += Size) {
      if (first >= own_classes()) continue;
#pragma unroll
      for (int i = first; i < first + Size; ++i) use(i);
    }
  }

  // What unguarded()'s logits come multiplied by.
  HK_DEVICE float unit() const { return static_cast<float>(math::kLog2e) / p_.temperature; }

  template <class Student, class Teacher, class Errors, class Record, class Gradient>
  HK_DEVICE void unguarded(const Pixel& pixel, bool wanted, Student student, Teacher teacher, Errors errors, Record record,
                           Gradient gradient_of) const {
    const int labelled = own(pixel.label);
    HakdClass<V> kept[Most];
    BestClass best;
    each_of_groups<Group>([&](int i) {
      kept[i].student = student(i);  // the logit, until its exponential takes its place
      best.offer(parameters_.kmm ? kept[i].student : teacher(i), i);
    });
    const int anchored = anchor_of(best);
    HakdSums<V> sums;
    const int count = own_classes(), visited = (count + kVisited - 1) / kVisited * kVisited;
    sums.weight = V(static_cast<float>(count - visited));  // a class without mass has the weight 1
    const V proj(pixel.factor * proj_scale_);
    each_of_groups<kVisited>([&](int i) {
      const Chosen<V> label{i == labelled}, anchor{i == anchored};
      const V w_t = teacher(i);
      HakdVisit<V> visit = exponentials<Power>(kept[i].student, w_t, label, anchor, parameters_, sums);
      HakdErrors<V> e;
      mix<Proj>(visit, label, parameters_, sums, &e);
      kept[i] = weigh<Power>(visit, w_t, label, anchor, parameters_, V(1.f), sums);
      if constexpr (Proj) errors(i, pixel.masked(e.student * proj), pixel.masked(e.teacher * proj));
    });
    add_over_group(sums, lanes_);
    add_over_group(sums.proj, lanes_);
    to_natural(sums, parameters_);
    const HakdPixel<V> done = finish(
        sums, parameters_, parameters_.cross_entropy ? surprise(sums.student) : surprise_ratio(sums.student, sums.hybrid));
    record(done.loss, sums.proj / V(static_cast<float>(p_.classes)));
    if (!wanted) return;
    const HakdFactors<V> factors = gradient_factors(done, V(pixel.factor * hakd_scale_));
    each_of_groups<Group>([&](int i) { gradient_of(i, pixel.masked(gradient(kept[i], Chosen<V>{i == anchored}, factors))); });
  }

  // Natural logits, of any size; `image` is looked at for Kem::kSpatial.
  template <class Student, class Teacher, class Errors, class Record, class Gradient>
  HK_DEVICE void guarded(const Pixel& pixel, int64_t image, bool wanted, Student student, Teacher teacher, Errors errors,
                         Record record, Gradient gradient_of) const {
    const int labelled = own(pixel.label);
    const HakdParameters<float> p = parameters_;
    BestClass best;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) best.offer(p.kmm ? student(i) : teacher(i), i);
    const int anchored = anchor_of(best);

    HakdSums<V> sums;
    HakdMaxima<V> maxima{V(-INFINITY), V(-INFINITY), V(-INFINITY)};
    const V proj(pixel.factor * proj_scale_);
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      const V z_t = teacher(i);
      const Chosen<V> label{i == labelled};
      HakdMeasured<V> m;
      HakdErrors<V> e;
      reliabilities(student(i), z_t, label, m);
      measure<Proj>(z_t, label, p, m, maxima, sums, &e);
      if constexpr (Proj) errors(i, pixel.masked(e.student * proj), pixel.masked(e.teacher * proj));
    }
    highest_over_group(maxima.student, lanes_);
    highest_over_group(maxima.hybrid, lanes_);
    highest_over_group(maxima.score, lanes_);
    add_over_group(sums.proj, lanes_);

    const auto visit = [&](int i, HakdSums<V>& into) {
      const V z_t = teacher(i);
      const Chosen<V> label{i == labelled}, anchor{i == anchored};
      HakdMeasured<V> m;
      HakdClass<V> kept;
      reliabilities(student(i), z_t, label, m);
      score(z_t, label, p.kmm, m);
      V highest(0.f), scale(0.f);
      if (p.kem == Kem::kSpatial) {
        const float* spatial = p_.spatial + image * 2 * p_.classes + share_.member + i * lanes_;
        highest = V(read(spatial));
        scale = V(read(spatial + p_.classes));
      }
      weigh_student(m, anchor, p, maxima, into, kept);
      weigh_hybrid(m, anchor, p, highest, scale, maxima, into, kept);
      return kept;
    };
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) visit(i, sums);
    add_over_group(sums, lanes_);

    const HakdPixel<V> done = finish(sums, p, log_ratio_guarded(sums, p));
    record(done.loss, sums.proj / V(static_cast<float>(p_.classes)));
    if (!wanted) return;
    const HakdFactors<V> factors = gradient_factors(done, V(pixel.factor * hakd_scale_));
    HakdSums<V> unused;
#pragma unroll 1
    for (int i = 0; i < own_classes(); ++i) {
      const HakdClass<V> kept = visit(i, unused);
      gradient_of(i, pixel.masked(gradient(kept, Chosen<V>{i == anchored}, factors)));
    }
  }

 private:
  // Classes visited at once: with L_proj's gradients there are registers for half a group.
  static constexpr int kVisited = Proj && Group > 1 ? Group / 2 : Group;

  // Which of the thread's classes class c is, -1 for none.
  HK_DEVICE int own(int c) const { return Single ? c : share_.own(c); }

  // Which of the thread's classes the pixel's best one is, -1 for none; `best` names one of the thread's.
  HK_DEVICE int anchor_of(BestClass& best) const {
    if (Single) return best.number;
    best.number = share_.number(best.number);
    best.over_group(lanes_);
    return own(best.number);
  }

  const HakdProblem& p_;
  const ClassShare& share_;
  const int lanes_;
  const HakdParameters<float> parameters_;
  const float hakd_scale_, proj_scale_;
};

}  // namespace hetero::cuda
