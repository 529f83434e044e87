// What the loops of the projection work on, in plain pointers.
//
// The pixels of an image are counted through its rows and cut into tiles; images of few pixels share one. Forward, a thread's unit of
// work is a tile with all of its channels; backward it is a block of channels with a part of the tiles (of channels_last some runs of
// channels, tile by tile, so that a tile's pages are used up before the next one's). Nothing depends on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../pixel/macros.h"
#include "../core/rows.h"

namespace hetero::cpu {

// Blocks that are read, then multiplied, in the order of the features: with pixels side by side, and with channels.
constexpr int64_t kProjectChannels = 32, kProjectPixels = 256;
constexpr int64_t kProjectRun = 512, kProjectLastPixels = 32;
constexpr int64_t kBackChannels = 12, kBackPixels = 512;
constexpr int64_t kBackRun = 64, kBackRuns = 8, kBackLastPixels = 64;
// Distances of rows, which lie in different sets of the caches.
constexpr int kProjectPitch = kProjectPixels + 16, kProjectLastPitch = kProjectRun + 16;
constexpr int kBackPitch = kBackPixels + 16, kBackLastPitch = kBackLastPixels + 16;

// Features [B, channels, pixels] with pixels or channels side by side.
template <class Real>
struct FeatureMap {
  const void* data;
  DType dtype;
  DType rounding;  // that they are rounded to before anything else; kFloat or kDouble: none
  int64_t batch, channels, pixels;
  int64_t batch_stride, stride;  // of images; of channels or of pixels, whichever are not side by side
  bool channels_last;
  const Real* pilot;            // [channels] that is subtracted
  const uint8_t* unreached;     // [B, pixels]: pixels whose features are taken for 0, or null
};

// Pixels [p0, p0 + n) of some images, side by side.
struct PixelTile {
  int64_t image, images, p0, n;
  HK_INLINE int64_t total() const { return images * n; }
};

// How the pixels of all images are cut, into tiles of at most `size` of them.
struct PixelTiles {
  PixelTiles() = default;
  HK_INLINE PixelTiles(int64_t batch, int64_t pixels, int64_t size)
      : batch_(batch),
        pixels_(pixels),
        size_(std::max<int64_t>(size, 1)),
        images_(pixels > 0 ? std::clamp<int64_t>(size_ / pixels, 1, std::max<int64_t>(batch, 1)) : 1),
        per_image_((pixels + size_ - 1) / size_) {}

  HK_INLINE int64_t size() const { return size_; }
  HK_INLINE int64_t count() const { return images_ > 1 ? (batch_ + images_ - 1) / images_ : batch_ * per_image_; }
  HK_INLINE PixelTile at(int64_t index) const {
    if (images_ > 1) return {index * images_, std::min(images_, batch_ - index * images_), 0, pixels_};
    const int64_t p0 = index % per_image_ * size_;
    return {index / per_image_, 1, p0, std::min(size_, pixels_ - p0)};
  }

 private:
  int64_t batch_ = 0, pixels_ = 0, size_ = 1, images_ = 1, per_image_ = 0;
};

template <class Real>
struct ProjectProblem {
  FeatureMap<Real> features;
  int64_t classes;
  const Real* weight;      // [channels, K]; for channels_last [K, padded channels]
  int64_t padded_channels;
  PixelTiles tiles;
  Real* logits;            // [B, K, pixels]
  double* statistics;      // [tiles, K, 2]: mean and sum of squared differences from it, or null
};

template <class Real>
struct ProjectBackProblem {
  FeatureMap<Real> features;
  int64_t classes;
  const Real* weight;       // [K, padded channels]; for channels_last [runs, K, kBackRun]
  int64_t padded_channels;  // whole blocks of channels
  const Real* gradient;     // [tiles, K, pitch], zeros after a tile's pixels
  const Real* by_pixel;     // for channels_last [B, pixels, K]: the same
  PixelTiles tiles;
  int64_t block, blocks, tiles_per_part;  // channels of a block, for channels_last some runs; blocks; of the tiles
  Real* weight_gradient;    // [parts, K, padded channels], or null
  void* features_gradient;  // [B, channels, pixels] of the features' dtype and order, dense, or null
};

// Gradient of raw logits: what the loss gave, and what batch statistics pass on.
template <class Real>
struct LogitGradient {
  const void* given;  // [B, K, pixels] or null
  DType dtype;
  int64_t stride[3];
  const Real* logits;     // [B, K, pixels], where there are coefficients
  const Real *constant, *mean, *slope;  // [K] each, or null: + constant + slope (z - mean)
  int64_t classes, pixels, pitch;
  PixelTiles tiles;
  Real* out;       // [tiles, K, pitch], zeros after a tile's pixels
  Real* by_pixel;  // [B, pixels, K] or null
};

template <class Real>
struct ProjectionKernels {
  void (*project)(const ProjectProblem<Real>&, int64_t tile_begin, int64_t tile_end);
  void (*back)(const ProjectBackProblem<Real>&, int64_t unit_begin, int64_t unit_end);
  void (*logit_gradient)(const LogitGradient<Real>&, int64_t tile_begin, int64_t tile_end);
  int lanes;
};

extern const ProjectionKernels<float> kAvx512ProjectionKernels, kAvx2ProjectionKernels, kPortableProjectionKernels;
extern const ProjectionKernels<double> kDoubleProjectionKernels;

}  // namespace hetero::cpu
