// Features of a network and how kernels that project them cut their work; shared by the kernels and the host's plans.
//
// A tile is 16 or 32 pixels of an image, counted through its rows. Channels come in *slices* of 16, the student's and then the
// teacher's; each of a block's eight warps has every eighth, which no other warp touches, in the projection and in the weights'
// gradient.
#pragma once

#include <cstdint>

#include "../../pixel/macros.h"
#include "../core/runtime.h"
#include "../core/types.h"

namespace hetero::cuda {

constexpr int kWarps = 8, kFeatureThreads = 32 * kWarps;
constexpr int kSliceChannels = 16;
constexpr int kMostSlices = 6;  // of a warp, whose weight gradients it can keep: 768 channels of two networks
// Of 8 classes: what kernels are compiled for; kMoreClassTiles: those of the projection on its own.
constexpr int kFewClassTiles = 4, kManyClassTiles = 12, kMoreClassTiles = 20, kMostClassTiles = 24;
constexpr int kMostFeatureClasses = 8 * kMostClassTiles;
constexpr int kRoundFragments = 4;  // products of a warp that are added to the other warps' at a time
constexpr int kBackPixels = 32;     // of a tile of project_back
constexpr int kWeightTiles = 24;    // slices times class tiles that a warp has in a launch of the weights' gradient

HK_INLINE int slices_of(int64_t channels) { return static_cast<int>((channels + kSliceChannels - 1) / kSliceChannels); }
HK_INLINE int class_tiles_of(int64_t classes) { return static_cast<int>((classes + 7) / 8); }
// Distances of classes in shared memory, so that the 8 x 4 lanes of a fragment lie on different banks.
HK_INLINE int class_pitch(int pixels) { return pixels + 4; }
HK_INLINE int weight_pitch(int slices) { return slices * kSliceChannels + 4; }
HK_INLINE int slice_words(int pixels, int element_bytes) { return kSliceChannels * pixels * element_bytes / 4; }

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

// A network as the kernels see it.
struct FeatureNetwork {
  const void* data;  // [B, C, h, w]
  DType dtype;
  int64_t stride[4], channels;
  bool flat;         // rows follow each other: pixel n of an image lies at n stride[3]
  bool pixel_major;  // a pixel's channels lie side by side, and so they do in slices; else a channel's pixels
  bool aligned;      // a slice's 16 bytes lie side by side in memory, too, at multiples of 16
  int slices;        // of 16 channels, of which there are fewer than 2^31
  Matrix weight, bias;
  float *logit_gradient, *weight_slots, *bias_slots;  // [B, K, h, w]; [splits, K, C]; [blocks, K]; null: not wanted
};

struct FeatureGrid {
  int64_t tiles_of_image, pixels, width;  // `pixels` of an image
  int tiles;                              // of all images
  int slots;                              // slices that a warp has on chip or under way
};

inline FeatureNetwork describe(const FeatureArguments& f, int64_t batch, int64_t height, int64_t width) {
  FeatureNetwork out{};
  out.data = f.data;
  out.dtype = f.dtype;
  for (int i = 0; i < 4; ++i) out.stride[i] = f.stride[i];
  if (width == 1) out.stride[3] = out.stride[2];  // the next pixel is in the next row
  out.channels = f.channels;
  out.slices = slices_of(f.channels);
  out.flat = height == 1 || width == 1 || f.stride[2] == width * f.stride[3];
  out.pixel_major = f.stride[1] == 1 && out.stride[3] != 1 && f.channels > 1;
  const int run = f.dtype == DType::kFloat ? 4 : 8;
  const auto multiple = [&](int64_t stride, int64_t size) { return size <= 1 || stride % run == 0; };
  out.aligned = reinterpret_cast<uintptr_t>(f.data) % 16 == 0 && multiple(f.stride[0], batch);
  if (out.pixel_major) {
    out.aligned = out.aligned && multiple(f.stride[3], width) && multiple(f.stride[2], height);
  } else {
    out.aligned = out.aligned && out.flat && (out.stride[3] == 1 || height * width == 1) && multiple(f.stride[1], f.channels);
  }
  out.weight = f.weight;
  out.bias = f.bias;
  out.logit_gradient = f.logit_gradient;
  return out;
}

}  // namespace hetero::cuda
