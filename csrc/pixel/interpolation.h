// Where a pixel of the loss grid lies on a coarse grid: what F.interpolate computes (docs/mathematics.md, section 1).
#pragma once

#include <cstdint>
#include <type_traits>

#include "macros.h"

namespace hetero {

// Bilinear, one axis: the two coarse positions are lower and min(lower + 1, coarse - 1), weighted 1 - fraction and
// fraction. In double: float32 positions are off by 1e-6 and more on large grids with uneven scales.
struct SourcePosition {
  int64_t lower;
  double fraction;
};

HK_INLINE SourcePosition source_position(int64_t index, int64_t fine, int64_t coarse, bool align_corners) {
  double position;
  if (align_corners) {
    position = fine > 1 ? static_cast<double>(index) * static_cast<double>(coarse - 1) / static_cast<double>(fine - 1) : 0.0;
  } else {
    position = (static_cast<double>(index) + 0.5) * static_cast<double>(coarse) / static_cast<double>(fine) - 0.5;
    position = position < 0.0 ? 0.0 : position;
  }
  // On a coarse position where it is one but for rounding (others are 1 / (2 fine) away): a neighbour that does not count must
  // have a weight of exactly 0.
  int64_t lower = static_cast<int64_t>(position + 0.5);
  const double off = position - static_cast<double>(lower);
  if (off < 1e-9 && off > -1e-9) {
    position = static_cast<double>(lower);
  } else {
    lower = static_cast<int64_t>(position);
  }
  lower = lower < coarse - 1 ? lower : coarse - 1;
  double fraction = position - static_cast<double>(lower);
  return {lower, lower == coarse - 1 ? 0.0 : fraction};
}

// a / b of numbers that are not negative: without a sign 32 bits take a GPU half the instructions.
template <class Int>
HK_INLINE Int quotient(Int a, Int b) {
  using Unsigned = std::make_unsigned_t<Int>;
  return static_cast<Int>(static_cast<Unsigned>(a) / static_cast<Unsigned>(b));
}

// The same positions in exact integers, for GPUs, whose float64 is slow: pixel i lies at (i step + offset) / unit on the
// coarse grid, not below 0. Functions of an Int calculate in it: int32_t where the axis is `narrow`, as 64 bits take a GPU longer.
struct ExactAxis {
  int64_t fine, coarse, step, offset, unit;
  bool identity;

  static HK_INLINE ExactAxis make(int64_t fine, int64_t coarse, bool align_corners) {
    if (align_corners) return {fine, coarse, coarse - 1, 0, fine > 1 ? fine - 1 : 1, fine == coarse};
    return {fine, coarse, 2 * coarse, coarse - fine, 2 * fine, fine == coarse};
  }

  // Whether 32 bits hold what is divided, to one coarse cell beyond the grid's ends: near 2 (coarse + 1) fine in `first`, below
  // 2^30.
  HK_INLINE bool narrow() const { return fine < INT32_MAX && coarse < INT32_MAX && (fine + 1) * (coarse + 2) < INT32_MAX / 4; }

  template <class Int = int64_t>
  HK_INLINE Int position(std::type_identity_t<Int> i) const {
    const Int at = i * Int(step) + Int(offset);
    return at < 0 ? 0 : at;
  }

  template <class Int = int64_t>
  HK_INLINE Int lower(std::type_identity_t<Int> i) const {
    return identity ? i : quotient(position<Int>(i), Int(unit));
  }

  // Weight of the upper neighbour of pixel i.
  HK_INLINE float fraction(int64_t i, int64_t lower) const {
    if (identity || lower >= coarse - 1) return 0.f;
    return static_cast<float>(position(i) - lower * unit) / static_cast<float>(unit);
  }

  // First pixel whose lower neighbour is `at` or more; `fine` if there is none.
  template <class Int = int64_t>
  HK_INLINE Int first(std::type_identity_t<Int> at) const {
    if (at <= 0) return 0;
    if (identity) return at < Int(fine) ? at : Int(fine);
    if (step == 0) return Int(fine);
    const Int i = quotient(at * Int(unit) - Int(offset) + Int(step) - 1, Int(step));
    return i < Int(fine) ? i : Int(fine);
  }
};

// Nearest neighbour exactly as F.interpolate(mode="nearest"), whose arithmetic is float32.
HK_INLINE int64_t nearest_index(int64_t index, int64_t fine, int64_t coarse) {
  const float scale = static_cast<float>(coarse) / static_cast<float>(fine);
  const int64_t nearest = static_cast<int64_t>(static_cast<float>(index) * scale);
  return nearest < coarse - 1 ? nearest : coarse - 1;
}

}  // namespace hetero
