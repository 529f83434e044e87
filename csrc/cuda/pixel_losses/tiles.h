// How the loss grid is cut into tiles, one for a block of threads; shared by the kernels and the host's plans.
#pragma once

#include "../../pixel/interpolation.h"
#include "../core/runtime.h"

namespace hetero::cuda {

// Tiles of one axis. They are shifted so that, where the scale allows, a tile begins where a cell of the student's grid
// does: then few coarse rows and columns are needed by two tiles.
struct AxisTiles {
  int64_t fine, count, shift;
  int size;

  static AxisTiles make(const ExactAxis& axis, int size) {
    AxisTiles tiles{axis.fine, 1, 0, size};
    if (size < axis.fine) {
      const int64_t cell = axis.first(axis.lower(size));
      tiles.shift = cell > 0 && cell <= size ? size - cell : 0;
      tiles.count = (axis.fine + tiles.shift + size - 1) / size;
    }
    return tiles;
  }

  // `Int`: see ExactAxis.
  template <class Int = int64_t>
  HK_INLINE Int begin(std::type_identity_t<Int> tile) const {
    return tile == 0 ? 0 : tile * Int(size) - Int(shift);
  }
  HK_INLINE int64_t end(int64_t tile) const {
    const int64_t at = (tile + 1) * size - shift;
    return at < fine ? at : fine;
  }
  template <class Int = int64_t>
  HK_INLINE Int of(std::type_identity_t<Int> pixel) const {
    return quotient(pixel + Int(shift), Int(size));
  }

  // Coarse positions that a tile reaches on an axis.
  HK_INLINE int reach(const ExactAxis& axis, int64_t tile) const {
    const int64_t last = axis.lower(end(tile) - 1), upper = last + !axis.identity;
    return static_cast<int>((upper < axis.coarse ? upper : axis.coarse - 1) - axis.lower(begin(tile)) + 1);
  }

  int widest_reach(const ExactAxis& axis) const {
    int widest = 0;
    for (int64_t tile = 0; tile < count; ++tile) widest = reach(axis, tile) > widest ? reach(axis, tile) : widest;
    return widest;
  }
};

// Lanes that share a pixel, so that each has few enough classes for its registers.
constexpr int kClassesPerThread = 20;
HK_INLINE int lanes_per_pixel(int64_t classes) {
  int lanes = 1;
  while (lanes < 32 && classes > int64_t(lanes) * kClassesPerThread) lanes *= 2;
  return lanes;
}

// A lane evaluates its classes in groups, whose chains of instructions overlap; the last group is filled up with classes
// that have no mass (TileNetwork::prepare).
constexpr int kClassGroup = 4;
HK_INLINE int whole_groups(int classes) { return (classes + kClassGroup - 1) / kClassGroup * kClassGroup; }

// How the classes of a column of staged logits lie in shared memory: a lane's one after the other, so that it finds them
// at constant distances. Distances of lanes and of columns are odd, so that they lie on different banks.
struct ClassOrder {
  int shift, stride, pitch;  // lanes = 1 << shift
  int filled;                // classes of a column, those without mass included

  HK_INLINE ClassOrder(int classes, int lanes) : shift(0) {
    while (1 << shift < lanes) ++shift;
    stride = whole_groups((classes + lanes - 1) / lanes);
    filled = stride << shift;
    stride |= 1;
    pitch = stride << shift | 1;
  }
  HK_INLINE int member(int c) const { return c & ((1 << shift) - 1); }
  HK_INLINE int position(int c) const { return member(c) * stride + (c >> shift); }
};

constexpr int kScratch = 32;  // values that a sum over a block needs

// Rows of a band whose labels are in shared memory at a time: few, so that blocks stay small, in a power of two.
constexpr int kLabelRows = 8;
HK_INLINE int label_rows(int rows) { return rows < kLabelRows ? rows : kLabelRows; }

// Bytes of a block's arrays, as the kernels take them (tile.cuh).
inline int64_t network_bytes(int classes, int lanes, int span, int rows, int columns, bool accumulates) {
  return array_bytes(int64_t(span) * ClassOrder(classes, lanes).pitch, 8) + array_bytes(columns, 2) + array_bytes(columns, 4) +
         array_bytes(span + 2, 4) + 2 * array_bytes(rows, 4) + (accumulates ? array_bytes(2 * int64_t(classes) * columns, 4) : 0);
}

inline int64_t label_bytes(int rows, int columns) { return array_bytes(int64_t(label_rows(rows)) * columns, 2); }

inline int64_t common_bytes(const ClassOrder& order) { return 4 * array_bytes(kScratch, 4) + array_bytes(order.pitch, 4); }

}  // namespace hetero::cuda
