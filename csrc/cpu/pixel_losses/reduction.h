// What turns per-pixel terms into a loss (docs/mathematics.md, section 8): divisors before the pass, sums after it.
#pragma once

#include <vector>

#include "pixel_losses.h"

namespace hetero::cpu {

template <class Real>
class LossReduction {
 public:
  // `own` are the two terms' own divisors; sets the problem's coefficients. A divisor of zero means that there is nothing
  // to average.
  LossReduction(const LossArguments<Real>& a, const double (&own)[2], PixelProblem<Real>& problem) : a_(a) {
    for (int term = 0; term < 2; ++term) {
      const double divisor = a.normalizer[term] ? *a.normalizer[term] : own[term];
      factor_[term] = a.reduction != Reduction::kMean ? 1.0 : divisor == 0 ? 0.0 : 1.0 / divisor;
      problem.coefficient[term] = static_cast<Real>(a.weight[term] * factor_[term]);
    }
  }

  // `partial` [parts, 2] are the terms' sums; with Reduction::kNone the terms of all `pixels` are there already.
  void finish(const std::vector<double>& partial, int64_t pixels, const Runtime& runtime) const {
    if (a_.reduction == Reduction::kNone) {
      runtime.parallel(pixels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          a_.loss[i] = static_cast<Real>(a_.weight[0] * a_.term[0][i] + a_.weight[1] * a_.term[1][i]);
        }
      });
      return;
    }
    double total[2] = {0, 0};
    for (size_t i = 0; i < partial.size(); ++i) total[i % 2] += partial[i];
    for (int term = 0; term < 2; ++term) {
      total[term] *= factor_[term];
      *a_.term[term] = static_cast<Real>(total[term]);
    }
    *a_.loss = static_cast<Real>(a_.weight[0] * total[0] + a_.weight[1] * total[1]);
  }

 private:
  const LossArguments<Real>& a_;
  double factor_[2];
};

}  // namespace hetero::cpu
