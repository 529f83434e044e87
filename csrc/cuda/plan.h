// Launch plans: how a call is cut into blocks, for a card's shared memory and multiprocessors. Plain C++, no CUDA.
#pragma once

#include <string>

#include "features.h"

namespace hetero::cuda {

struct Card {
  int multiprocessors = 132;
  int64_t shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10;  // bytes
  int threads_per_multiprocessor = 2048;
};

struct GridSize {
  int64_t height, width;
};

struct PlanRequest {
  int64_t batch, classes;
  GridSize loss, student, teacher;  // the teacher's size is looked at only where there is one
  bool has_teacher, student_gradient, teacher_gradient, align_corners;
};

struct NetworkPlan {
  ExactAxis rows, columns;
  int span = 0, slot_rows = 0;  // most coarse columns and rows that a tile reaches
  bool direct() const { return rows.identity && columns.identity; }
};

struct Plan {
  AxisTiles rows, columns;
  NetworkPlan student, teacher;
  int lanes, threads;
  int64_t shared_bytes, blocks;
  int blocks_per_multiprocessor;  // by threads and shared memory; registers may allow fewer
};

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

// Throws std::runtime_error where not even a tile of one column fits the card's shared memory.
Plan make_plan(const PlanRequest& request, const Card& card);

}  // namespace hetero::cuda
