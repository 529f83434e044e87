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
  // The weight's gradient: blocks of channels, parts of the sums over pixels, slots and shared memory.
  int columns, splits, weight_slots;
  int64_t weight_shared_bytes;
};

// Throws std::runtime_error where the card's shared memory does not take it.
ProjectionPlan make_plan(const ProjectionRequest& request, const Card& card);

}  // namespace hetero::cuda
