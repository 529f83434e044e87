// The losses on coarse logits, from raw memory to terms and gradients: plan, label summary, passes, reductions.
#pragma once

#include <cstdint>

#include "../core/runtime.h"
#include "problem.h"

namespace hetero::cpu {

// A network's logits [B, K, height, width] and where its gradient (contiguous, same shape) goes, or null. With a
// normalization also where that of scale and shift [2, K] goes, wherever there is the logits'.
template <class Real>
struct Logits {
  const void* data;
  DType dtype;
  int64_t stride[4];
  int64_t height, width;
  Real* gradient;
  const Normalization<Real>* normalization = nullptr;
  Real* normalization_gradient = nullptr;
};

struct Labels {  // [B, height, width]
  const void* data;
  LabelType type;
  int64_t stride[3];
  int64_t height, width;
};

template <class Real>
struct LossArguments {
  int64_t batch, classes;
  Logits<Real> student;
  const Logits<Real>* teacher;  // null: none
  Labels labels;
  bool label_resolution;  // the loss grid is the labels' grid, else the student's
  bool align_corners;
  int64_t ignore_index;
  Reduction reduction;
  double temperature;
  double weight[2];             // of the two terms
  const double* normalizer[2];  // replaces the term's divisor, or null
  const Real* upstream;         // [B, loss grid] factors of the pixels' gradients, or null
  int64_t upstream_stride[3];
  Real *loss, *term[2];         // one value each, or [B, loss grid] for Reduction::kNone
};

struct HakdChoices {
  bool kmm;
  Kem kem;
  bool cross_entropy;
};

// Terms: hakd and proj. Throws std::runtime_error for a wrong label.
template <class Real>
void hakd_loss(const LossArguments<Real>& arguments, const HakdChoices& choices, const Runtime& runtime);

// Terms: task and kd. `class_weight` is [K] or null.
template <class Real>
void segmentation_loss(const LossArguments<Real>& arguments, const Real* class_weight, double label_smoothing,
                       const Runtime& runtime);

}  // namespace hetero::cpu
