// The loss on features, from device pointers to launches. Plain C++: what registrations call.
#pragma once

#include "../pixel_losses/pixel_losses.h"
#include "projected_plan.h"

namespace hetero::cuda {

// A matrix [K, C], or a vector [K] (one stride), of any layout.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride[2];
};

// A network's features [B, C, h, w], its projection, and where gradients go (contiguous), or null: of the logits
// [B, K, h, w], of the weight [K, C] and of the bias [K].
struct FeatureArguments {
  const void* data;
  DType dtype;
  int64_t stride[4], channels;
  Matrix weight, bias;  // bias.data may be null
  float *logit_gradient, *weight_gradient, *bias_gradient;
};

// `arguments` as for hakd_loss at feature resolution; its networks tell the grid and no more. `kem`: 0 none, 1 class.
void projected_hakd_loss(const Arguments& arguments, const FeatureArguments& student, const FeatureArguments& teacher, bool kmm,
                         int kem, bool cross_entropy, const Runtime& runtime);

// out [B, C, h, w] = factor times the logits' gradient [B, K, h, w] (contiguous) through the weight [K, C].
struct BackArguments {
  int64_t batch, classes, channels, pixels;
  const float* logit_gradient;
  Matrix weight;
  const float* factor;  // one number, or null
  void* out;
  DType dtype;
  int64_t channel_stride, pixel_stride;  // of `out`, whose images follow each other
};
void project_back(const BackArguments& arguments, const Runtime& runtime);

ProjectedPlan plan_of(const Arguments& arguments, const FeatureArguments& student, const FeatureArguments& teacher, const Card& card);

}  // namespace hetero::cuda
