// Launch plans: how a call is cut into blocks, for a card's shared memory and multiprocessors. Plain C++, no CUDA.
#pragma once

#include "../core/runtime.h"
#include "tiles.h"

namespace hetero::cuda {

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

// Throws std::runtime_error where not even a tile of one column fits the card's shared memory.
Plan make_plan(const PlanRequest& request, const Card& card);

}  // namespace hetero::cuda
