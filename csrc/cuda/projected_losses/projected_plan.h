// Launch plans of the losses on features. Plain C++, no CUDA.
#pragma once

#include "../core/runtime.h"
#include "../projection/features.h"

namespace hetero::cuda {

struct ProjectedRequest {
  int64_t batch, classes, pixels;  // of an image
  int64_t channels[2];             // of student and teacher
  int element_bytes[2];
};

// How the loss on features is cut (features.h).
struct ProjectedPlan {
  int pixels;          // of a tile
  int class_tiles;     // that the kernel is compiled for
  bool on_chip;        // the weights' gradient comes from the tile on chip; else a second launch reads the features again
  bool resident;       // the weights lie in shared memory; else each tile reads them through the caches
  int slots;           // slices that a warp has on chip or under way
  int threads;
  int64_t shared_bytes, tiles, blocks;
  // The second launch: blocks of channels of both networks, parts of their gradient, its slots and shared memory.
  int columns[2], splits, weight_slots;
  int64_t weight_shared_bytes;
};

// Throws std::runtime_error where the card's shared memory does not take it.
ProjectedPlan make_plan(const ProjectedRequest& request, const Card& card);

}  // namespace hetero::cuda
