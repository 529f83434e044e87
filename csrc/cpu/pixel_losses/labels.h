// One look at the labels before the loss: are they all right, and what do the means divide by?
#pragma once

#include "../core/runtime.h"
#include "problem.h"

namespace hetero::cpu {

// Throws std::runtime_error for a label that is neither a class nor ignore_index. `class_weight` is [K] or null. Sums in
// the pixels' order whatever the number of threads. Unless `sampled` is null, it gets the loss grid's labels [B, height, width],
// -1 where ignored.
template <class Real>
LabelSummary check_labels(const PixelProblem<Real>& problem, const Real* class_weight, const Kernels<Real>& kernels,
                          const Runtime& runtime, int32_t* sampled = nullptr);

}  // namespace hetero::cpu
