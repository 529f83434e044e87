// How the losses on features cut their work; shared by the kernels and the host's plans.
//
// A tile is 16 or 32 pixels of an image, counted through its rows. Channels come in *slices* of 16, the student's and then the
// teacher's; each of a block's eight warps has every eighth, which no other warp touches, in the projection and in the weights'
// gradient.
#pragma once

#include <cstdint>

#include "../pixel_losses/tiles.h"

namespace hetero::cuda {

constexpr int kWarps = 8, kFeatureThreads = 32 * kWarps;
constexpr int kSliceChannels = 16;
constexpr int kMostSlices = 6;  // of a warp, whose weight gradients it can keep: 768 channels of two networks
constexpr int kFewClassTiles = 4, kManyClassTiles = 12, kMostClassTiles = 24;  // of 8 classes: what kernels are compiled for
constexpr int kMostFeatureClasses = 8 * kMostClassTiles;
constexpr int kRoundFragments = 4;  // products of a warp that are added to the other warps' at a time
constexpr int kBackPixels = 32;     // of a tile of project_back
constexpr int kWeightTiles = 24;    // slices times class tiles that a warp has in a launch of the weights' gradient

HK_INLINE int slices_of(int64_t channels) { return static_cast<int>((channels + kSliceChannels - 1) / kSliceChannels); }
HK_INLINE int class_tiles_of(int64_t classes) { return static_cast<int>((classes + 7) / 8); }
// Distances of classes in shared memory, so that the 8 x 4 lanes of a fragment lie on different banks.
HK_INLINE int class_pitch(int pixels) { return pixels + 4; }
HK_INLINE int back_pitch(int pixels) { return pixels + 8; }
HK_INLINE int weight_pitch(int slices) { return slices * kSliceChannels + 4; }
HK_INLINE int slice_words(int pixels, int element_bytes) { return kSliceChannels * pixels * element_bytes / 4; }

}  // namespace hetero::cuda
