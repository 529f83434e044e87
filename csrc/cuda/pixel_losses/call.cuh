// What the losses do around their own kernels: the problem from the arguments, divisors before, the finish after.
#pragma once

#include <vector>

#include "../core/launch.cuh"
#include "pixel_losses.h"
#include "reduction.cuh"

namespace hetero::cuda {

// use.template operator()<Constants...>() where a value is one of a few.
template <class Use>
void with_flag(bool flag, Use use) {
  if (flag) {
    use.template operator()<true>();
  } else {
    use.template operator()<false>();
  }
}

// Labels, terms and outputs, which every loss has; `blocks` of the main launch, on a loss grid of rows and columns.
class LossCall {
 public:
  LossCall(const Arguments& a, const Runtime& runtime, Problem& problem, const AxisTiles& rows, const AxisTiles& columns,
           int64_t blocks)
      : runtime_(runtime), problem_(problem) {
    problem.rows = rows;
    problem.columns = columns;
    problem.batch = a.batch;
    problem.classes = static_cast<int>(a.classes);
    problem.labels = {a.labels, a.label_type, {a.label_stride[0], a.label_stride[1], a.label_stride[2]}, a.label_height,
                      a.label_width, a.ignore_index, a.label_height != rows.fine || a.label_width != columns.fine};
    problem.upstream = a.upstream;
    for (int i = 0; i < 3; ++i) problem.upstream_stride[i] = a.upstream_stride[i];
    problem.temperature = static_cast<float>(a.temperature);
    problem.limit = static_cast<float>(logit_limit(a.temperature));
    problem.output = {allocate<float>(2 * blocks), allocate<unsigned long long>(1), a.loss, {a.term[0], a.term[1]},
                      a.reduction == Reduction::kNone};
    for (int i = 0; i < 2; ++i) {
      problem.term[i] = {static_cast<float>(a.weight[i]), 1.f, Divisor::kOne, nullptr, 0};
      if (a.reduction != Reduction::kMean) continue;
      problem.term[i].divisor = a.normalizer[i] ? Divisor::kGiven : Divisor::kCount;
      problem.term[i].parts = a.normalizer[i];
      problem.term[i].count = 1;
    }
    clear(problem.output.valid, sizeof(unsigned long long), runtime);
  }

  // A divisor of a term that is known beforehand.
  void set_divisor(int term, int64_t divisor) {
    if (problem_.term[term].divisor != Divisor::kCount) return;
    problem_.term[term].divisor = Divisor::kOne;
    problem_.term[term].share = 1.f / static_cast<float>(divisor);
  }

  // Counts beforehand what the main launch must know: the sum of class weights, and the number of valid pixels where
  // gradients of two terms have different divisors, or where one is not divided afterwards: all of them (`gradients`), or those
  // that it writes in place.
  void count_divisors(const float* class_weight, bool gradients = false) {
    Term(&term)[2] = problem_.term;
    const auto counts = [&](int i) { return term[i].divisor == Divisor::kCount && (term[i].weight != 0 || i == 0); };
    const auto given = [&](int i) { return term[i].divisor != Divisor::kCount && term[i].weight != 0; };
    const bool gradient = problem_.student.gradient || problem_.teacher.gradient;
    for (const Network* n : {&problem_.student, &problem_.teacher}) gradients |= n->in_place();
    const bool weighted = class_weight && counts(0);
    if (!weighted && !(gradients && (counts(0) || counts(1))) && !(gradient && ((counts(0) && given(1)) || (counts(1) && given(0))))) return;
    float* parts = allocate<float>(2 * kDivisorBlocks);
    launch("divisors_kernel", divisors_kernel, {kDivisorBlocks, 128, common_bytes(ClassOrder(1, 1))}, runtime_, problem_, class_weight, parts);
    for (int i = 0; i < 2; ++i) {
      if (term[i].divisor != Divisor::kCount) continue;
      term[i].divisor = Divisor::kGiven;
      term[i].parts = parts + (i == 0 && class_weight ? kDivisorBlocks : 0);
      term[i].count = kDivisorBlocks;
    }
  }

  template <class T>
  T* allocate(int64_t count) const {
    return static_cast<T*>(runtime_.allocate((count > 0 ? count : 1) * int64_t(sizeof(T))));
  }

 protected:
  const Runtime& runtime_;
  Problem& problem_;
};

// The losses on logits.
class Call : public LossCall {
 public:
  Call(const Arguments& a, const Runtime& runtime, Problem& problem, bool scores = false)
      : Call(a, runtime, problem, plan_of(a, runtime.card, scores)) {}

  // The last launch: gradients of both networks, and the loss unless it is a map.
  void finish() {
    bool deferred = false;
    for (const Term& term : problem_.term) deferred |= term.divisor == Divisor::kCount && term.weight != 0;
    const auto blocks = [&](const Network& n) { return n.gradient && !n.in_place() ? finish_blocks(problem_, n) : int64_t(0); };
    const Finish f{a_.student.gradient, a_.teacher.gradient, blocks(problem_.student), blocks(problem_.teacher), plan.blocks, deferred};
    const int64_t total = f.student_blocks + f.teacher_blocks + !problem_.output.maps;
    const auto narrow = [](const Network& n) { return n.rows.narrow() && n.columns.narrow(); };
    with_flag(narrow(problem_.student) && narrow(problem_.teacher), [&]<bool Narrow>() {
      if (total > 0) launch("finish_kernel", finish_kernel<Narrow>, {total, kFinishThreads, kFinishSharedBytes}, runtime_, problem_, f);
    });
    sum_normalizations();
  }

  Launch main_launch() const { return {plan.blocks, plan.threads, plan.shared_bytes}; }

  const Plan plan;

 private:
  // What scales and shifts get.
  void sum_normalizations() const {
    NormalizationSums n{};
    const Network* networks[2] = {&problem_.student, &problem_.teacher};
    float* outs[2] = {a_.student.normalization_gradient, a_.teacher.normalization_gradient};
    const int columns = 2 * problem_.classes;
    int64_t blocks = 0;
    for (int i = 0; i < 2; ++i) {
      if (!networks[i]->normalization_parts) continue;
      n.parts[i] = networks[i]->normalization_parts;
      n.out[i] = outs[i];
      n.pieces[i] = finish_pieces(problem_.batch, *networks[i]);
      blocks += columns;
    }
    if (blocks > 0) launch("normalization_kernel", normalization_kernel, {blocks, kFinishThreads, 8 * kScratch}, runtime_, n, columns);
  }

  Call(const Arguments& a, const Runtime& runtime, Problem& problem, const Plan& chosen)
      : LossCall(a, runtime, problem, chosen.rows, chosen.columns, chosen.blocks), plan(chosen), a_(a) {
    problem.lanes = plan.lanes;
    problem.student = network(a.student, plan.student);
    problem.teacher = a.has_teacher ? network(a.teacher, plan.teacher) : Network{};
    // More classes than the registers of a pixel's lanes take are left to the guarded mathematics, which keeps nothing.
    if (a.classes > int64_t(plan.lanes) * kClassesPerThread) problem.limit = -1.f;
  }

  Network network(const Logits& logits, const NetworkPlan& n) const {
    Network out{logits.data, logits.dtype, {}, n.rows, n.columns, logits.gradient, n.direct(), n.span, n.slot_rows,
                logits.scale, logits.shift, logits.relu, nullptr};
    for (int i = 0; i < 4; ++i) out.stride[i] = logits.stride[i];
    if (logits.gradient && !out.direct) {
      out.gradient = allocate<float>(plan.blocks * n.slot_rows * problem_.classes * n.span);
    }
    if (logits.gradient && logits.scale) {
      out.normalization_parts = allocate<float>(finish_pieces(problem_.batch, out) * 2 * problem_.classes);
    }
    return out;
  }

  const Arguments& a_;
};

}  // namespace hetero::cuda
