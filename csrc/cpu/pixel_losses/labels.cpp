#include "labels.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace hetero::cpu {

template <class Real>
LabelSummary check_labels(const PixelProblem<Real>& problem, const Real* class_weight, const Kernels<Real>& kernels,
                          const Runtime& runtime, int32_t* sampled) {
  std::vector<LabelSummary> rows(problem.batch * problem.height);
  runtime.parallel(static_cast<int64_t>(rows.size()), [&](int64_t begin, int64_t end) {
    kernels.summarize_labels(problem, class_weight, begin, end, rows.data(), sampled);
  });
  LabelSummary all;
  for (const LabelSummary& row : rows) {
    if (row.wrong) {
      throw std::runtime_error("labels[" + std::to_string(row.image) + ", " + std::to_string(row.row) + ", " +
                               std::to_string(row.column) + "] is " + std::to_string(row.value) + ", expected a class in [0, " +
                               std::to_string(problem.classes) + ") or ignore_index=" + std::to_string(problem.ignore_index));
    }
    all.valid += row.valid;
    all.weight += row.weight;
  }
  return all;
}

template LabelSummary check_labels(const PixelProblem<float>&, const float*, const Kernels<float>&, const Runtime&,
                                   int32_t*);
template LabelSummary check_labels(const PixelProblem<double>&, const double*, const Kernels<double>&, const Runtime&,
                                   int32_t*);

}  // namespace hetero::cpu
