// What the loop over features works on, in plain pointers.
//
// The pixels of all images are cut into tiles, tiles into chunks: a chunk is the unit of work of a thread and has sums of its
// own, which a last pass adds up in order, so that results do not depend on the number of threads.
#pragma once

#include "../pixel_losses/problem.h"

namespace hetero::cpu {

constexpr int64_t kTile = 64;  // pixels

// Channels of a weight gradient's slots: whole vectors of every instruction set.
inline int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

template <class Real>
struct Projection {
  const void* features;  // [B, channels, pixels]
  DType dtype;
  int64_t batch_stride, channel_stride, pixel_stride;
  int64_t channels;
  const Real* weight;     // [channels, K]: transposed
  // The same as pairs of bfloat16 numbers, [padded channels / 2, K], where both factors are bfloat16 and the machine has a
  // dot instruction for them (dot_bf16.h), else null.
  const uint32_t* weight_pairs;
  const Real* bias;       // [K] or null
  Real* logit_gradient;   // [B, K, pixels] or null
  Real* weight_gradient;  // slots [chunks, K, padded channels] or null
  Real* bias_gradient;    // slots [chunks, K] or null
};

template <class Real>
struct ProjectedProblem {
  HakdProblem<Real> pixel;  // its networks are not looked at
  Projection<Real> student, teacher;
  int64_t tiles_per_chunk;
};

// Gradient of a network's features from that of its logits.
template <class Real>
struct ProjectBack {
  int64_t pixels, classes, channels;
  const Real* logit_gradient;  // [B, K, pixels]
  const Real* weight;          // [K, channels]
  Real factor;
  Real* gradient;              // [B, channels, pixels], dense in either order
  int64_t channel_stride, pixel_stride;
};

template <class Real>
struct ProjectedKernels {
  void (*hakd)(const ProjectedProblem<Real>&, int64_t chunk_begin, int64_t chunk_end);
  void (*project_back)(const ProjectBack<Real>&, int64_t tile_begin, int64_t tile_end);
};

extern const ProjectedKernels<float> kAvx512ProjectedKernels, kAvx2ProjectedKernels, kPortableProjectedKernels;
extern const ProjectedKernels<double> kDoubleProjectedKernels;

}  // namespace hetero::cpu
