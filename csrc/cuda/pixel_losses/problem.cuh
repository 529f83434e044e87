// What the kernels of the pixel losses are told, in plain pointers.
#pragma once

#include "../../pixel/hakd.h"
#include "../../pixel/normalization.h"
#include "../../pixel/segmentation.h"
#include "../core/memory.cuh"
#include "tiles.h"

namespace hetero::cuda {

struct Network {
  const void* logits;  // [B, K, h, w]
  DType dtype;
  int64_t stride[4];
  ExactAxis rows, columns;
  // Null where no gradient is wanted. `direct`, where the network has the loss grid: the gradient [B, K, h, w]; else
  // slots [tiles, slot_rows, K, span], which reduction.cuh adds up.
  float* gradient;
  bool direct;
  int span, slot_rows;
  const float *scale, *shift;  // [K], of what raw logits mean, or null
  bool relu;
  float* normalization_parts;  // [pieces, 2, K]: what each piece of the gradient adds to scale's and shift's

  // Whether the main launch leaves the gradient as it is to be: the last one has nothing to add up and no raw logits to turn it to.
  bool in_place() const { return gradient && direct && !scale; }
};

struct Labels {
  const void* data;  // [B, height, width]
  LabelType type;
  int64_t stride[3], height, width, ignore_index;
  bool sampled;  // by nearest neighbour, to reach the loss grid
};

// What divides a term's sum. A number of valid pixels is known only after the main launch: kCount divides in the last.
enum class Divisor : int { kOne, kGiven, kCount };

struct Term {
  float weight, share;  // share: a divisor known beforehand, as its inverse
  Divisor divisor;
  const float* parts;   // kGiven: `count` numbers whose sum it is
  int count;
};

struct Output {
  float* partial;              // [blocks, 2]: the terms' sums
  unsigned long long* valid;   // number of valid pixels
  float *loss, *term[2];       // one value each, or maps [B, loss grid]
  bool maps;
};

struct Problem {
  AxisTiles rows, columns;
  int64_t batch;
  int classes, lanes;
  Network student, teacher;
  Labels labels;
  const float* upstream;  // factor of each pixel's gradient, or null for 1
  int64_t upstream_stride[3];
  Term term[2];
  Output output;
  float temperature;
  float limit;  // |z| up to which the unguarded mathematics holds
};

struct HakdProblem : Problem {
  bool kmm, cross_entropy;
  Kem kem;
  // Kem::kSpatial, [B, 2, K]: the scores' maximum m and 1 / sum e^{q - m}; [blocks, 2, K]: m and sum of every block.
  float *spatial, *block_scores;
  HK_INLINE HakdParameters<float> parameters() const { return {temperature, kmm, kem, cross_entropy}; }
};

struct SegmentationProblem : Problem {
  float smoothing;
  const float* class_weight;  // [K], or null for 1
};

}  // namespace hetero::cuda
