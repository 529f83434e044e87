// A loss on the student's grid, as it is cheapest to read: the labels that the grid samples are written down once, and rows
// that follow each other in memory are joined to longer ones.
#pragma once

#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "labels.h"
#include "loss_grid.h"
#include "plan.h"

namespace hetero::cpu {

template <class Real>
class FeatureGrid {
 public:
  // Checks the labels.
  FeatureGrid(const LossArguments<Real>& a, const Runtime& runtime) : arguments(a) {
    const int64_t height = a.student.height, width = a.student.width;
    int32_t* sampled = static_cast<int32_t*>(runtime.allocate(a.batch * height * width * int64_t(sizeof(int32_t))));
    valid = sample(a, sampled, runtime);
    int64_t rows = 1;  // that make one
    if (joins(a)) {
      for (int64_t r = 2; r <= height && r * width <= kMaxBlock; ++r) rows = height % r == 0 ? r : rows;
    }
    arguments.labels = {sampled, LabelType::kInt32, {height * width, width * rows, 1}, height / rows, width * rows};
    arguments.ignore_index = -1;
    if (rows == 1) return;
    join(arguments.student, rows);
    if (a.teacher) {
      teacher_ = *a.teacher;
      join(*teacher_, rows);
      arguments.teacher = &*teacher_;
    }
    join(arguments.upstream_stride[1], arguments.upstream_stride[2], width, rows);
  }
  FeatureGrid(const FeatureGrid&) = delete;  // arguments point into this object
  FeatureGrid& operator=(const FeatureGrid&) = delete;

  LossArguments<Real> arguments;  // the same loss
  int64_t valid;                  // pixels that count

 private:
  static int64_t sample(const LossArguments<Real>& a, int32_t* sampled, const Runtime& runtime) {
    const LossGrid<Real> grid(a);
    PixelProblem<Real> problem{};
    std::vector<double> none;
    grid.describe(a, none, problem);
    return check_labels<Real>(problem, nullptr, pixel_kernels<Real>(), runtime, sampled).valid;
  }

  static bool adjacent(int64_t height, int64_t width, int64_t row_stride, int64_t column_stride) {
    return height == 1 || width == 1 || row_stride == width * column_stride;
  }
  static bool adjacent(const Logits<Real>& x) { return adjacent(x.height, x.width, x.stride[2], x.stride[3]); }

  // Whether neighbouring rows are neighbours in memory, wherever there are rows.
  static bool joins(const LossArguments<Real>& a) {
    const int64_t height = a.student.height, width = a.student.width;
    const bool same = !a.teacher || (a.teacher->height == height && a.teacher->width == width && adjacent(*a.teacher));
    return same && adjacent(a.student) &&
           (!a.upstream || adjacent(height, width, a.upstream_stride[1], a.upstream_stride[2]));
  }

  static void join(int64_t& row_stride, int64_t& column_stride, int64_t width, int64_t rows) {
    if (width == 1) column_stride = row_stride;
    row_stride *= rows;
  }
  static void join(Logits<Real>& x, int64_t rows) {
    join(x.stride[2], x.stride[3], x.width, rows);
    x.height /= rows;
    x.width *= rows;
  }

  std::optional<Logits<Real>> teacher_;
};

}  // namespace hetero::cpu
