// Features to raw logits and their batch statistics, and back, from raw memory to results.
#pragma once

#include <cstdint>

#include "../core/runtime.h"
#include "projection_problem.h"

namespace hetero::cpu {

// pilot [channels]: a value near each channel's mean, 0 where there is none that is a number.
template <class Real>
void find_pilot(const FeatureMap<Real>& features, Real* pilot, const Runtime& runtime);

// logits [B, K, pixels] = weight [K, channels] (f - features.pilot). Unless `statistics` [4, K] is null it gets, per class, the
// number of pixels, the logits' mean, the sum of their squared differences from it, and weight times pilot.
template <class Real>
void project(const FeatureMap<Real>& features, const Real* weight, int64_t classes, Real* logits, double* statistics,
             const Runtime& runtime);

// What the losses say of raw logits: dz = given + mean_gradient / n + 2 squares_gradient (z - mean), n = B pixels.
template <class Real>
struct LogitsAndGradients {
  const void* given;  // [B, K, pixels] or null
  DType dtype;
  int64_t stride[3];
  const Real* logits;                                     // [B, K, pixels]
  // [K] each, or null: no statistics. The last is the gradient of weight times pilot, which is the weight's alone.
  const double *mean, *mean_gradient, *squares_gradient, *offset_gradient;
};

// The gradients of features (dtype and order of `features`, dense) and weight [K, channels]; null: not wanted. Features that no
// logit's gradient reaches contribute 0 to the weight's, whatever they are.
template <class Real>
void project_back(const FeatureMap<Real>& features, const Real* weight, int64_t classes, const LogitsAndGradients<Real>& logits,
                  void* features_gradient, Real* weight_gradient, const Runtime& runtime);

}  // namespace hetero::cpu
