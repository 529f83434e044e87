// One look at the labels before the loss: are they all right, and what do the means divide by?
#pragma once

#include "problem.h"
#include "runtime.h"

namespace hetero::cpu {

struct LabelSummary {
  int64_t valid = 0;         // pixels of the loss grid that count
  double weight = 0;         // sum of their labels' class weights (`valid` without weights)
  bool wrong = false;        // some label is neither a class nor ignore_index; then the first such pixel:
  int64_t image = 0, row = 0, column = 0, value = 0;  // in the labels' own coordinates
};

// `class_weight` is [K] or null. Sums in the pixels' order whatever the number of threads.
template <class Real>
LabelSummary summarize_labels(const PixelProblem<Real>& problem, const Real* class_weight, const Runtime& runtime);

}  // namespace hetero::cpu
