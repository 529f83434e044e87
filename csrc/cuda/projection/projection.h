// Features to raw logits and their batch statistics, and back, from device pointers to launches. Plain C++: what
// registrations call.
#pragma once

#include "projection_plan.h"

namespace hetero::cuda {

struct ProjectionArguments {
  int64_t batch, classes, height, width;
  FeatureArguments features;  // whose bias and gradients are not looked at
  DType rounding;             // what features are rounded to first; kFloat: nothing
};

// logits [B, K, h, w] = weight (features - pilot). Unless `statistics`, float64 [4, K], is null it gets, per class, the number
// of pixels, the logits' mean, the sum of their squared differences from it, and weight times pilot; the pilot [C] is found
// first, a value near each channel's mean. Without statistics there is none.
void project(const ProjectionArguments& arguments, float* logits, float* pilot, double* statistics, const Runtime& runtime);

// The gradient of raw logits z, formed as it is read: given + mean_gradient / n + 2 squares_gradient (z - mean).
struct LogitGradient {
  const float *given, *logits;               // [B, K, h, w], without gaps; `given` may be null
  const double *statistics, *by_statistics;  // [4, K], as `project` has them, and their gradient; or null
  double inverse;                            // 1 / n
};

// The weight's gradient [K, C], without gaps; `pilot` may be null. Features that no logit's gradient reaches contribute 0,
// whatever they are.
void project_weights(const ProjectionArguments& arguments, const LogitGradient& gradient, const float* pilot, float* out,
                     const Runtime& runtime);

// out [B, C, h, w] = factor times the logits' gradient through the weight [K, C].
struct BackArguments {
  int64_t batch, classes, channels, pixels;
  LogitGradient gradient;
  Matrix weight;
  const float* factor;  // one number, or null
  void* out;
  DType dtype;
  int64_t channel_stride, pixel_stride;  // of `out`, whose images follow each other
};
void project_back(const BackArguments& arguments, const Runtime& runtime);

ProjectionPlan plan_of(const ProjectionArguments& arguments, const Card& card);

}  // namespace hetero::cuda
