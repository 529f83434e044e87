#include "labels.h"

#include <vector>

namespace hetero::cpu {

namespace {

template <class Stored, class Real>
void summarize_row(const PixelProblem<Real>& p, const Real* class_weight, int64_t image, int64_t row, LabelSummary& out) {
  const int64_t label_row = p.label_row[row], stride = p.label_stride[2];
  const Stored* in = static_cast<const Stored*>(p.labels) + image * p.label_stride[0] + label_row * p.label_stride[1];
  int64_t valid = 0, wrong = 0;
  for (int64_t x = 0; x < p.width; ++x) {
    const int64_t label = static_cast<int64_t>(in[p.label_column[x] * stride]);
    const bool counts = label != p.ignore_index;
    valid += counts;
    wrong += counts && (label < 0 || label >= p.classes);
  }
  out.valid = valid;
  out.weight = static_cast<double>(valid);
  if (wrong == 0 && class_weight == nullptr) return;
  out.weight = 0;
  for (int64_t x = 0; x < p.width; ++x) {
    const int64_t label = static_cast<int64_t>(in[p.label_column[x] * stride]);
    if (label == p.ignore_index) continue;
    if (label < 0 || label >= p.classes) {
      out = {valid, 0.0, true, image, label_row, p.label_column[x], label};
      return;
    }
    if (class_weight != nullptr) out.weight += class_weight[label];
  }
}

}  // namespace

template <class Real>
LabelSummary summarize_labels(const PixelProblem<Real>& problem, const Real* class_weight, const Runtime& runtime) {
  std::vector<LabelSummary> rows(problem.batch * problem.height);
  runtime.parallel(static_cast<int64_t>(rows.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / problem.height, row = i % problem.height;
      switch (problem.label_type) {
        case LabelType::kInt64:
          summarize_row<int64_t>(problem, class_weight, image, row, rows[i]);
          break;
        case LabelType::kInt32:
          summarize_row<int32_t>(problem, class_weight, image, row, rows[i]);
          break;
        case LabelType::kUInt8:
          summarize_row<uint8_t>(problem, class_weight, image, row, rows[i]);
          break;
      }
    }
  });
  LabelSummary all;
  for (const LabelSummary& row : rows) {
    if (row.wrong) return row;
    all.valid += row.valid;
    all.weight += row.weight;
  }
  return all;
}

template LabelSummary summarize_labels(const PixelProblem<float>&, const float*, const Runtime&);
template LabelSummary summarize_labels(const PixelProblem<double>&, const double*, const Runtime&);

}  // namespace hetero::cpu
