#include "labels.h"

#include <vector>

namespace hetero::cpu {

template <class Real>
LabelSummary summarize_labels(const PixelProblem<Real>& problem, const Real* class_weight, const Kernels<Real>& kernels,
                              const Runtime& runtime) {
  std::vector<LabelSummary> rows(problem.batch * problem.height);
  runtime.parallel(static_cast<int64_t>(rows.size()), [&](int64_t begin, int64_t end) {
    kernels.summarize_labels(problem, class_weight, begin, end, rows.data());
  });
  LabelSummary all;
  for (const LabelSummary& row : rows) {
    if (row.wrong) return row;
    all.valid += row.valid;
    all.weight += row.weight;
  }
  return all;
}

template LabelSummary summarize_labels(const PixelProblem<float>&, const float*, const Kernels<float>&, const Runtime&);
template LabelSummary summarize_labels(const PixelProblem<double>&, const double*, const Kernels<double>&, const Runtime&);

}  // namespace hetero::cpu
