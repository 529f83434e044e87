// One network's logits over a block of columns of one item: interpolated horizontally once, for both coarse rows, so that
// a pixel's logit costs one vertical interpolation; and the gradient the same way back.
#pragma once

#include "../core/rows.h"
#include "../core/vec.h"
#include "adjoint.h"

namespace hetero::cpu {

// One row of the loss grid in a tile. A value of its own, so that the loops keep its members in registers.
template <class V>
struct TileRow {
  using Real = typename V::Real;
  const Real *upper, *lower;
  Real *upper_gradient, *lower_gradient;
  int64_t stride, gradient_stride;  // from class to class
  V fraction, rest;                 // of the lower row, of the upper
  bool flat, gradient;
  bool single;                      // only the upper row is read: the lower one's weight is 0, and it may be infinite

  HK_INLINE V logit(int64_t c, int x) const {
    // (1 - f) u + f l, not u + f (l - u): between -10 and 10 the difference alone is off by 1e-6.
    const V z = V::load(upper + c * stride + x);
    return single ? z : fma(fraction, V::load(lower + c * stride + x), rest * z);
  }

  // Takes a pixel's gradient, once for each.
  HK_INLINE void add(int64_t c, int x, V g) const {
    Real* above = upper_gradient + c * gradient_stride + x;
    if (flat) return g.store(above);
    Real* below = lower_gradient + c * gradient_stride + x;
    fma(rest, g, V::load(above)).store(above);
    fma(fraction, g, V::load(below)).store(below);
  }

  void add_nothing(int64_t classes, int x) const {
    if (!gradient || !flat) return;
    for (int64_t c = 0; c < classes; ++c) V(Real(0)).store(upper_gradient + c * gradient_stride + x);
  }
};

template <class V>
class Tile {
 public:
  using Real = typename V::Real;
  using Part = typename V::Part;

  Tile(const Network<Real>& network, const PixelProblem<Real>& problem, Scratch& scratch)
      : network_(network), problem_(problem), block_(problem.block), line_(line_length(network, problem)) {
    const int64_t plane = problem.classes * block_;
    upper_ = take_array<Real>(scratch, plane);
    upper_lines_ = network.columns.identity ? upper_ : take_array<Real>(scratch, problem.classes * line_);
    if (!per_row()) {
      lower_ = take_array<Real>(scratch, plane);
      lower_lines_ = network.columns.identity ? lower_ : take_array<Real>(scratch, problem.classes * line_);
    }
    // What lies beyond a block's pixels is computed with, though never used: let it be numbers.
    std::memset(upper_, 0, sizeof(Real) * plane);
    std::memset(upper_lines_, 0, sizeof(Real) * problem.classes * line_);
    if (!per_row()) {
      std::memset(lower_, 0, sizeof(Real) * plane);
      std::memset(lower_lines_, 0, sizeof(Real) * problem.classes * line_);
    }
    if (network.gradient == nullptr) return;
    upper_gradient_ = take_array<Real>(scratch, per_row() ? plane : 2 * plane);
    if (!per_row()) lower_gradient_ = upper_gradient_ + plane;
    if (!network.columns.identity) adjoint_ = Adjoint<Part>(problem.block, line_, scratch);
  }

  // Upper bound of what the constructor takes.
  static int64_t bytes(const Network<Real>& network, const PixelProblem<Real>& problem) {
    const int64_t line = line_length(network, problem);
    return (4 * problem.classes * problem.block + 2 * problem.classes * line) * int64_t(sizeof(Real)) +
           Adjoint<Part>::bytes(problem.block, line) + 8 * 64;
  }

  bool per_row() const { return network_.rows.identity; }

  // Reads what `row` of `image` needs for columns [x0, x0 + n), in the unguarded mathematics' units.
  void stage(int64_t image, int64_t row, int64_t x0, int n) {
    image_ = image;
    row_ = row;
    x0_ = x0;
    n_ = n;
    read(problem_.logit_scale);
  }

  // Whether every logit that was staged is within the problem's limit.
  bool bounded() const { return bounded_; }

  // Changes the units to natural ones or back.
  void use(bool natural) {
    const Real scale = natural ? Real(1) : problem_.logit_scale;
    if (scale != scale_) read(scale);
  }

  void clear_gradient() {
    if (network_.gradient == nullptr || per_row()) return;
    std::memset(upper_gradient_, 0, sizeof(Real) * 2 * problem_.classes * block_);
  }

  TileRow<V> row(int64_t row) const {
    const Real fraction = network_.rows.fraction[row];
    TileRow<V> out{upper_, lower_, upper_gradient_, lower_gradient_, block_, block_, V(fraction), V(1 - fraction), per_row(),
                   network_.gradient != nullptr, per_row() || fraction == 0};
    if (out.gradient && direct()) {
      out.upper_gradient = gradient_row(image_, 0, row) + x0_;
      out.gradient_stride = network_.height * network_.width;
    }
    return out;
  }

  // Clears the item's slots; for networks staged per row, the gradient's row.
  void clear(int64_t item, int64_t image, int64_t row) {
    if (network_.gradient == nullptr) return;
    if (!per_row()) {
      std::memset(slot(item, 0), 0, sizeof(Real) * 2 * problem_.classes * network_.width);
      return;
    }
    if (network_.columns.identity) return;  // every element is written once
    for (int64_t c = 0; c < problem_.classes; ++c) {
      std::memset(gradient_row(image, c, row), 0, sizeof(Real) * network_.width);
    }
  }

  // Adds the block's gradient to the coarse rows.
  void flush(int64_t item) {
    if (network_.gradient == nullptr || direct()) return;
    Real* upper = per_row() ? gradient_row(image_, 0, row_) : slot(item, 0);
    const int64_t stride = per_row() ? network_.height * network_.width : network_.width;
    const int64_t rows = (per_row() ? 1 : 2) * problem_.classes;  // slots hold the two coarse rows one after the other
    if (network_.columns.identity) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(upper + r * stride + x0_, upper_gradient_ + r * block_, sizeof(Real) * n_);
      }
      return;
    }
    adjoint_.prepare(network_.columns, x0_, n_);
    adjoint_.add(upper_gradient_, block_, rows, upper, stride);
  }

 private:
  // Elements of a coarse row that a block needs, and room for whole vectors from any of them on.
  static int64_t line_length(const Network<Real>& network, const PixelProblem<Real>& problem) {
    if (network.columns.identity) return problem.block;
    int64_t longest = 0;
    for (int64_t x0 = 0; x0 < problem.width; x0 += problem.block) {
      const int64_t end = x0 + problem.block < problem.width ? x0 + problem.block : problem.width;
      const int64_t count = network.columns.upper[end - 1] - network.columns.lower[x0] + 1;
      longest = count > longest ? count : longest;
    }
    return (longest + 2 * Part::kLanes) / 16 * 16 + 16;
  }

  // Whether gradients go to memory without a stop in the tile.
  bool direct() const { return per_row() && network_.columns.identity && n_ % V::kLanes == 0; }

  Real* slot(int64_t item, int side) const {
    return network_.gradient + (item * 2 + side) * problem_.classes * network_.width;
  }

  Real* gradient_row(int64_t image, int64_t c, int64_t row) const {
    return network_.gradient + ((image * problem_.classes + c) * network_.height + row) * network_.width;
  }

  void read(Real scale) {
    const Axis<Real>& columns = network_.columns;
    const int64_t first = columns.lower[x0_];
    const int count = static_cast<int>(columns.upper[x0_ + n_ - 1] - first) + 1;
    const int64_t base = image_ * network_.stride[0] + first * network_.stride[3];
    scale_ = scale;
    MagnitudeBits<Real> largest = 0;
    read_lines(base + network_.rows.lower[row_] * network_.stride[2], count, upper_lines_, largest);
    if (!per_row()) read_lines(base + network_.rows.upper[row_] * network_.stride[2], count, lower_lines_, largest);
    bounded_ = largest <= magnitude_bits(problem_.logit_limit);
    if (columns.identity) return;
    expand(first, upper_lines_, upper_);
    if (!per_row()) expand(first, lower_lines_, lower_);
  }

  void read_lines(int64_t offset, int count, Real* lines, MagnitudeBits<Real>& largest) const {
    for (int64_t c = 0; c < problem_.classes; ++c) {
      Real* line = lines + c * line_;
      if (per_row()) prefetch(offset + c * network_.stride[1] + network_.stride[2], count);
      const int64_t from = offset + c * network_.stride[1];
      if (const Normalization<Real>* normalization = network_.normalization) {
        load_changed<Real>(network_.logits, network_.dtype, from, network_.stride[3], count, scale_, line, largest,
                           [n = *normalization, c](Real z) { return n(c, z); });
      } else {
        load_logits(network_.logits, network_.dtype, from, network_.stride[3], count, scale_, line, largest);
      }
    }
  }

  // Asks for a row that is read soon: a row of every class is too short for the processor to foresee the next. An address
  // beyond the logits does no harm.
  void prefetch(int64_t offset, int count) const {
    const int64_t bytes = element_size(network_.dtype);
    const char* row = static_cast<const char*>(network_.logits) + offset * bytes;
    for (int64_t i = 0; i < count * network_.stride[3] * bytes; i += 64) __builtin_prefetch(row + i);
  }

  void expand(int64_t first, const Real* lines, Real* out) const {
    const Axis<Real>& columns = network_.columns;
    for (int x = 0; x < n_; x += Part::kLanes) {
      const int32_t* lower = columns.lower + x0_ + x;
      const int32_t* upper = columns.upper + x0_ + x;
      const Part fraction = Part::load(columns.fraction + x0_ + x), rest = Part(Real(1)) - fraction;
      const Real* line = lines + (lower[0] - first);
      if (upper[Part::kLanes - 1] - lower[0] < Part::kLanes) {  // one vector of the coarse row holds all: permute it
        typename Part::Ints from, to;
        std::memcpy(&from, lower, sizeof(from));
        std::memcpy(&to, upper, sizeof(to));
        from -= lower[0];
        to -= lower[0];
        for (int64_t c = 0; c < problem_.classes; ++c) {
          const Part table = Part::load(line + c * line_);
          fma(fraction, permute(table, to), rest * permute(table, from)).store(out + c * block_ + x);
        }
      } else {
        for (int64_t c = 0; c < problem_.classes; ++c) {
          alignas(64) Real left[Part::kLanes], right[Part::kLanes];
          for (int i = 0; i < Part::kLanes; ++i) {
            left[i] = line[c * line_ + lower[i] - lower[0]];
            right[i] = line[c * line_ + upper[i] - lower[0]];
          }
          fma(fraction, Part::load(right), rest * Part::load(left)).store(out + c * block_ + x);
        }
      }
    }
  }

  const Network<Real>& network_;
  const PixelProblem<Real>& problem_;
  const int64_t block_, line_;
  Real *upper_ = nullptr, *lower_ = nullptr, *upper_gradient_ = nullptr, *lower_gradient_ = nullptr;
  Real *upper_lines_ = nullptr, *lower_lines_ = nullptr;
  Adjoint<Part> adjoint_;
  int64_t image_ = 0, row_ = 0, x0_ = 0;
  int n_ = 0;
  Real scale_ = 1;
  bool bounded_ = true;
};

}  // namespace hetero::cpu
