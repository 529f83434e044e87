// The grid that a loss is evaluated on, and its labels: what every loss tells its loops in the same words.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "pixel_losses.h"
#include "plan.h"

namespace hetero::cpu {

template <class Real>
class LossGrid {
 public:
  explicit LossGrid(const LossArguments<Real>& a)
      : height(a.label_resolution ? a.labels.height : a.student.height),
        width(a.label_resolution ? a.labels.width : a.student.width),
        label_rows_(nearest_table(height, a.labels.height)),
        label_columns_(nearest_table(width, a.labels.width)) {}

  // Sets what follows from the arguments alone. `partial` is [parts, 2]; the problem keeps pointers into it and into this.
  void describe(const LossArguments<Real>& a, std::vector<double>& partial, PixelProblem<Real>& problem) const {
    problem.batch = a.batch;
    problem.classes = a.classes;
    problem.height = height;
    problem.width = width;
    problem.labels = a.labels.data;
    problem.label_type = a.labels.type;
    std::memcpy(problem.label_stride, a.labels.stride, sizeof(problem.label_stride));
    problem.label_row = label_rows_.data();
    problem.label_column = label_columns_.data();
    problem.label_columns_identity = width == a.labels.width;
    problem.ignore_index = a.ignore_index;
    problem.logit_limit = static_cast<Real>(logit_limit(a.temperature));
    problem.logit_scale = static_cast<Real>(math::kLog2e / a.temperature);
    problem.upstream = a.upstream;
    std::memcpy(problem.upstream_stride, a.upstream_stride, sizeof(problem.upstream_stride));
    problem.partial = partial.data();
    if (a.reduction == Reduction::kNone) std::copy_n(a.term, 2, problem.maps);
  }

  const int64_t height, width;

 private:
  const std::vector<int32_t> label_rows_, label_columns_;
};

}  // namespace hetero::cpu
