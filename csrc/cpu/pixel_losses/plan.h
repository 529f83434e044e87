// The geometry of one call: how the loss grid maps to the coarse grids and how it is cut into items.
#pragma once

#include <vector>

#include "../core/runtime.h"
#include "problem.h"

namespace hetero::cpu {

template <class Real>
struct AxisTable {
  std::vector<int32_t> lower, upper;
  std::vector<Real> fraction;
  bool identity;

  // `columns`: a pixel on a coarse position has it as both neighbours, half of each, so that no infinity beside it is
  // multiplied by 0. Rows of an item share their neighbours; TileRow reads one alone.
  AxisTable(int64_t fine, int64_t coarse, bool align_corners, bool columns);
  Axis<Real> view() const { return {lower.data(), upper.data(), fraction.data(), identity}; }
};

// For each of `fine` positions its nearest of `coarse`.
std::vector<int32_t> nearest_table(int64_t fine, int64_t coarse);

// Items of every image, in order. `rows` are the row axes of the networks that take part.
template <class Real>
std::vector<Item> make_items(int64_t batch, int64_t height, const std::vector<const AxisTable<Real>*>& rows);

constexpr int kMaxBlock = 256;  // columns

// Columns per block: as many of `width` as keep a tile's planes in a core's second-level cache.
int columns_per_block(int64_t width, int64_t classes, int planes, int element_bytes, int lanes);

// gradient[b, c, y, :] = the sum of the slots of all items that touch coarse row y, in the items' order.
template <class Real>
void add_slots(const Real* slots, const std::vector<Item>& items, const AxisTable<Real>& rows, int64_t batch,
               int64_t classes, int64_t height, int64_t width, Real* gradient, const Runtime& runtime);

}  // namespace hetero::cpu
