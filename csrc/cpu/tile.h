// One network's logits over a block of columns of one item: interpolated horizontally once, for both coarse rows, so that
// a pixel's logit costs one vertical interpolation; and the gradient the same way back.
#pragma once

#include "rows.h"
#include "vec.h"

namespace hetero::cpu {

// One row of the loss grid in a tile. A value of its own, so that the loops keep its members in registers.
template <class V>
struct TileRow {
  using Real = typename V::Real;
  const Real *upper, *lower;
  Real *upper_gradient, *lower_gradient;
  int64_t block;
  V fraction, rest;  // of the lower row, of the upper
  bool flat, gradient;

  HK_INLINE V logit(int64_t c, int x) const {
    // (1 - f) u + f l, not u + f (l - u): between -10 and 10 the difference alone is off by 1e-6.
    const V z = V::load(upper + c * block + x);
    return flat ? z : fma(fraction, V::load(lower + c * block + x), rest * z);
  }

  HK_INLINE void add(int64_t c, int x, V g) const {
    Real* above = upper_gradient + c * block + x;
    if (flat) return (V::load(above) + g).store(above);
    Real* below = lower_gradient + c * block + x;
    fma(rest, g, V::load(above)).store(above);
    fma(fraction, g, V::load(below)).store(below);
  }
};

template <class V>
class Tile {
 public:
  using Real = typename V::Real;

  Tile(const Network<Real>& network, const PixelProblem<Real>& problem, Scratch& scratch)
      : network_(network), problem_(problem), block_(problem.block), gradient_(network.gradient != nullptr) {
    const int64_t plane = problem.classes * block_;
    upper_ = take(scratch, plane);
    line_ = take(scratch, line_length());
    if (!network.rows.identity) {
      lower_ = take(scratch, plane);
      lower_line_ = take(scratch, line_length());
    }
    if (gradient_) {
      upper_gradient_ = take(scratch, plane);
      if (!network.rows.identity) lower_gradient_ = take(scratch, plane);
    }
  }

  // Upper bound of what the constructor takes.
  static int64_t bytes(const PixelProblem<Real>& problem, const Network<Real>& network) {
    const int64_t line = network.width + problem.block + 3 * kMaxLanes;
    return (4 * problem.classes * problem.block + 2 * line) * int64_t(sizeof(Real)) + 6 * 64;
  }

  bool per_row() const { return network_.rows.identity; }

  // Reads what `row` of `image` needs for columns [x0, x0 + n) and clears the gradient. Returns whether every
  // logit's magnitude is within the problem's limit.
  bool stage(int64_t image, int64_t row, int64_t x0, int n) {
    const Axis<Real>& columns = network_.columns;
    const int64_t first = columns.lower[x0];
    const int count = static_cast<int>(columns.upper[x0 + n - 1] - first) + 1;
    const int64_t base = image * network_.stride[0] + first * network_.stride[3];
    const int64_t upper_row = base + network_.rows.lower[row] * network_.stride[2];
    const int64_t lower_row = base + network_.rows.upper[row] * network_.stride[2];
    for (int i = count; i < count + 2 * kMaxLanes; ++i) line_[i] = 0;
    if (!per_row()) {
      for (int i = count; i < count + 2 * kMaxLanes; ++i) lower_line_[i] = 0;
    }
    V largest(Real(0)), poison(Real(0));
    for (int64_t c = 0; c < problem_.classes; ++c) {
      const int64_t plane = c * network_.stride[1];
      load_logits(network_.logits, network_.dtype, upper_row + plane, network_.stride[3], count, line_);
      scan(line_, count, largest, poison);
      if (!per_row()) {
        load_logits(network_.logits, network_.dtype, lower_row + plane, network_.stride[3], count, lower_line_);
        scan(lower_line_, count, largest, poison);
        expand(lower_line_, x0, n, first, lower_ + c * block_);
      }
      expand(line_, x0, n, first, upper_ + c * block_);
    }
    if (gradient_) {
      const size_t plane = sizeof(Real) * problem_.classes * block_;
      std::memset(upper_gradient_, 0, plane);
      if (!per_row()) std::memset(lower_gradient_, 0, plane);
    }
    alignas(64) Real a[V::kLanes], b[V::kLanes];
    largest.store(a);
    poison.store(b);
    bool bounded = true;
    for (int i = 0; i < V::kLanes; ++i) bounded = bounded && a[i] <= problem_.logit_limit && b[i] == 0;
    return bounded;
  }

  TileRow<V> row(int64_t row) const {
    const Real fraction = network_.rows.fraction[row];
    return {upper_, lower_, upper_gradient_, lower_gradient_, block_, V(fraction), V(1 - fraction), per_row(), gradient_};
  }

  // Clears the item's slots; for networks staged per row, the gradient's row.
  void clear(int64_t item, int64_t image, int64_t row) {
    if (!gradient_) return;
    if (!per_row()) {
      std::memset(slot(item, 0), 0, sizeof(Real) * 2 * problem_.classes * network_.width);
      return;
    }
    if (network_.columns.identity) return;  // flush writes every element once
    for (int64_t c = 0; c < problem_.classes; ++c) {
      std::memset(gradient_row(image, c, row), 0, sizeof(Real) * network_.width);
    }
  }

  // Adds the block's gradient to the coarse rows.
  void flush(int64_t item, int64_t image, int64_t row, int64_t x0, int n) {
    if (!gradient_) return;
    for (int64_t c = 0; c < problem_.classes; ++c) {
      if (per_row()) {
        adjoint(upper_gradient_ + c * block_, x0, n, gradient_row(image, c, row));
      } else {
        adjoint(upper_gradient_ + c * block_, x0, n, slot(item, 0) + c * network_.width);
        adjoint(lower_gradient_ + c * block_, x0, n, slot(item, 1) + c * network_.width);
      }
    }
  }

 private:
  static Real* take(Scratch& scratch, int64_t n) { return static_cast<Real*>(scratch.take(n * sizeof(Real))); }
  int64_t line_length() const { return network_.width + block_ + 3 * kMaxLanes; }

  Real* slot(int64_t item, int side) const {
    return network_.gradient + (item * 2 + side) * problem_.classes * network_.width;
  }
  Real* gradient_row(int64_t image, int64_t c, int64_t row) const {
    return network_.gradient + ((image * problem_.classes + c) * network_.height + row) * network_.width;
  }

  static void scan(const Real* line, int count, V& largest, V& poison) {
    for (int i = 0; i < count; i += V::kLanes) {
      const V x = V::load(line + i);
      largest = math::maximum(math::maximum(x, -x), largest);
      poison = fma(x, V(Real(0)), poison);  // NaN from NaN and infinity
    }
  }

  void expand(const Real* line, int64_t x0, int n, int64_t first, Real* out) const {
    const Axis<Real>& columns = network_.columns;
    if (columns.identity) {
      for (int x = 0; x < n; x += V::kLanes) V::load(line + x).store(out + x);
      return;
    }
    for (int x = 0; x < n; x += V::kLanes) {
      const int32_t* lower = columns.lower + x0 + x;
      const int32_t* upper = columns.upper + x0 + x;
      V a, b;
      if (upper[V::kLanes - 1] - lower[0] < V::kLanes) {  // one vector of the coarse row holds all: permute it
        typename V::Ints from, to;
        std::memcpy(&from, lower, sizeof(from));
        std::memcpy(&to, upper, sizeof(to));
        const V table = V::load(line + (lower[0] - first));
        a = permute(table, from - lower[0]);
        b = permute(table, to - lower[0]);
      } else {
        alignas(64) Real left[V::kLanes], right[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) {
          left[i] = line[lower[i] - first];
          right[i] = line[upper[i] - first];
        }
        a = V::load(left);
        b = V::load(right);
      }
      const V fraction = V::load(columns.fraction + x0 + x);
      fma(fraction, b, (V(Real(1)) - fraction) * a).store(out + x);
    }
  }

  void adjoint(const Real* gradient, int64_t x0, int n, Real* out) const {
    const Axis<Real>& columns = network_.columns;
    if (columns.identity) {
      std::memcpy(out + x0, gradient, sizeof(Real) * n);
      return;
    }
    for (int x = 0; x < n;) {
      const int32_t lower = columns.lower[x0 + x], upper = columns.upper[x0 + x];
      Real left = 0, right = 0;
      for (; x < n && columns.lower[x0 + x] == lower; ++x) {
        const Real part = columns.fraction[x0 + x] * gradient[x];
        right += part;
        left += gradient[x] - part;
      }
      out[lower] += left;
      out[upper] += right;
    }
  }

  const Network<Real>& network_;
  const PixelProblem<Real>& problem_;
  const int64_t block_;
  const bool gradient_;
  Real *upper_ = nullptr, *lower_ = nullptr, *upper_gradient_ = nullptr, *lower_gradient_ = nullptr;
  Real *line_ = nullptr, *lower_line_ = nullptr;
};

}  // namespace hetero::cpu
