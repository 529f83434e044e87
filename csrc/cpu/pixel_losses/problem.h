// What the pixel loop works on, in plain pointers: no torch here, so that every kernel compiles and runs without it.
//
// The loss grid is cut into items, runs of rows that lie between the same two coarse rows of every network. An item is
// the unit of work of a thread; within it the columns are cut into blocks. Each item writes its gradient into slots of
// its own, and a last pass adds the slots in order, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../../arguments.h"
#include "../../pixel/hakd.h"
#include "../../pixel/normalization.h"
#include "../../pixel/segmentation.h"
#include "../core/rows.h"

namespace hetero::cpu {

constexpr int kMaxLanes = 32;

// One axis of a coarse grid, seen from the loss grid. Tables are padded by kMaxLanes copies of their last entry.
template <class Real>
struct Axis {
  const int32_t* lower;
  const int32_t* upper;
  const Real* fraction;
  bool identity;
};

// What a logit z means: scale z + shift of its class, and ReLU of that. Null: z itself.
template <class Real>
struct Normalization {
  const Real *scale, *shift;  // [K]
  bool relu;

  HK_INLINE Real operator()(int64_t c, Real z) const { return normalized(z, scale[c], shift[c], relu); }
};

template <class Real>
struct Network {
  const void* logits;  // [B, K, height, width]
  DType dtype;
  int64_t stride[4];
  int64_t height, width;
  Axis<Real> rows, columns;
  const Normalization<Real>* normalization;
  // Where gradients, by what logits mean, go, or null. With rows.identity: the gradient [B, K, height, width]; else slots
  // [items, 2, K, width], for the upper and the lower coarse row of the item.
  Real* gradient;
};

struct Item {
  int64_t image;
  int64_t row_begin, row_end;
};

template <class Real>
struct PixelProblem {
  int64_t batch, classes, height, width;  // of the loss grid
  Network<Real> student, teacher;
  bool has_teacher;

  const void* labels;
  LabelType label_type;
  int64_t label_stride[3];
  const int32_t* label_row;  // row and column of the labels for each of the loss grid
  const int32_t* label_column;
  bool label_columns_identity;
  int64_t ignore_index;

  const Item* items;
  int block;                // columns per block, a multiple of the lanes
  Real logit_limit;         // |z| up to which the unguarded mathematics holds,
  Real logit_scale;         // and what it wants logits multiplied by
  const Real* upstream;     // factor of each pixel's gradient, or null for 1
  int64_t upstream_stride[3];
  Real coefficient[2];      // factors of the two terms' gradients
  double* partial;          // [items, 2]: the terms summed over the item
  Real* maps[2];            // [B, height, width]: the terms per pixel, or null
};

// A network's gradient by what its logits mean, which becomes that by its logits.
template <class Real>
struct NormalizedGradient {
  Network<Real> network;  // its gradient is [B, K, height, width]
  int64_t batch, classes;
  Real* sums;             // [2, K]: gradients of scale and shift
};

template <class Real>
struct HakdProblem : PixelProblem<Real> {
  HakdParameters<Real> parameters;
  double* score_sums;           // [items, K, 2]: maximum m and sum of e^{q - m} (Kem::kSpatial)
  // [B, K] (Kem::kSpatial): the maximum m of the scores over the image, 1 / sum e^{q - m} and 1 / sum e^q.
  const Real *spatial_maximum, *spatial_scale, *spatial_scale_unguarded;
};

template <class Real>
struct SegmentationProblem : PixelProblem<Real> {
  SegmentationParameters<Real> parameters;
  const Real* class_weight;  // [K]
};

struct LabelSummary {
  int64_t valid = 0;         // pixels of the loss grid that count
  double weight = 0;         // sum of their labels' class weights (`valid` without weights)
  bool wrong = false;        // some label is neither a class nor ignore_index; then the first such pixel:
  int64_t image = 0, row = 0, column = 0, value = 0;  // in the labels' own coordinates
};

// The loops of one instruction set, over items [begin, end).
template <class Real>
struct Kernels {
  void (*hakd_scores)(const HakdProblem<Real>&, int64_t begin, int64_t end);
  void (*hakd)(const HakdProblem<Real>&, int64_t begin, int64_t end);
  void (*segmentation)(const SegmentationProblem<Real>&, int64_t begin, int64_t end);
  // Rows [begin, end) of the loss grid, all images' rows counted through; `class_weight` is [K] or null. Unless `sampled` is
  // null, the labels go there, -1 where ignored.
  void (*summarize_labels)(const PixelProblem<Real>&, const Real* class_weight, int64_t begin, int64_t end, LabelSummary* rows,
                           int32_t* sampled);
  void (*normalize_gradient)(const NormalizedGradient<Real>&, int64_t class_begin, int64_t class_end);
  int lanes;
};

extern const Kernels<float> kAvx512Kernels, kAvx2Kernels, kPortableKernels;
extern const Kernels<double> kDoubleKernels;

}  // namespace hetero::cpu
