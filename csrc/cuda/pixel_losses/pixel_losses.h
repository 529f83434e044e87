// The losses on coarse logits, from device pointers to launches. Plain C++: what registrations call.
#pragma once

#include "../core/runtime.h"
#include "../core/types.h"
#include "plan.h"

namespace hetero::cuda {

// A network's logits [B, K, height, width] and where its gradient (contiguous, same shape) goes, or null. With `scale` and
// `shift` [K] they are raw: they mean scale z + shift, then ReLU if `relu`; both get gradients [2, K] where the logits do.
struct Logits {
  const void* data;
  DType dtype;
  int64_t stride[4], height, width;
  float* gradient;
  const float *scale = nullptr, *shift = nullptr;
  bool relu = false;
  float* normalization_gradient = nullptr;
};

struct Arguments {
  int64_t batch, classes;
  Logits student, teacher;
  bool has_teacher;
  const void* labels;  // [B, label_height, label_width]
  LabelType label_type;
  int64_t label_stride[3], label_height, label_width;
  bool label_resolution;  // the loss grid is the labels' grid, else the student's
  bool align_corners;
  int64_t ignore_index;
  Reduction reduction;
  double temperature, weight[2];
  const float* normalizer[2];  // replaces a term's divisor, or null
  const float* upstream;       // [B, loss grid] factors of the pixels' gradients, or null
  int64_t upstream_stride[3];
  float *loss, *term[2];       // one value each, or [B, loss grid] for Reduction::kNone
};

// Terms: hakd and proj. `kem`: 0 none, 1 class, 2 spatial. A wrong label makes the loss NaN.
void hakd_loss(const Arguments& arguments, bool kmm, int kem, bool cross_entropy, const Runtime& runtime);

// Terms: task and kd. `class_weight` is [K] or null.
void segmentation_loss(const Arguments& arguments, const float* class_weight, double label_smoothing, const Runtime& runtime);

// The plan of a call's main launch; `scores`: kem="spatial", which keeps scores where the student's gradient has its sums.
Plan plan_of(const Arguments& arguments, const Card& card, bool scores);

}  // namespace hetero::cuda
