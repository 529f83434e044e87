// Launch plans of the projection. Plain C++, no CUDA.
#pragma once

#include "features.h"

namespace hetero::cuda {

struct ProjectionRequest {
  int64_t batch, classes, pixels, channels;  // pixels of an image
  int element_bytes;
};

// How features are cut (features.h). Classes beyond those of a kernel come in chunks, for each of which features are read.
struct ProjectionPlan {
  int pixels;       // of a tile
  int class_tiles;  // that kernels are compiled for, each a chunk's
  int chunks;
  int groups;       // tiles of a block; its warps share each tile's channels
  int slots;        // slices that a warp has under way
  int64_t tiles, blocks, shared_bytes;
  // The weight's gradient: pixels of its tiles, blocks of channels, parts of the sums over pixels, slots, tiles and shared memory.
  int weight_pixels, columns, splits, weight_slots;
  int64_t weight_tiles, weight_shared_bytes;
};

// Slices that a warp has in a launch of the weight's gradient.
constexpr int slices_of_warp(int class_tiles) { return class_tiles == kMoreClassTiles ? 2 : kWeightTiles / class_tiles; }

// Throws std::runtime_error where the card's shared memory does not take it.
ProjectionPlan make_plan(const ProjectionRequest& request, const Card& card);

}  // namespace hetero::cuda
