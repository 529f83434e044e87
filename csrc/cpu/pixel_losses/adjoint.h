// The adjoint of horizontal interpolation: gradients of a block's pixels, added up into the coarse row they came from.
#pragma once

#include <cstring>

#include "../core/scratch.h"
#include "../core/vec.h"
#include "problem.h"

namespace hetero::cpu {

// For a vector of pixels that one vector of the coarse row feeds, each pixel owns a row of weights over that coarse vector:
// (1 - f) and f at its two positions, 0 elsewhere. A class's gradient is then a chain of multiply-adds by broadcast pixels.
template <class Part>
class Adjoint {
 public:
  using Real = typename Part::Real;

  Adjoint() = default;
  Adjoint(int block, int64_t line, Scratch& scratch)
      : line_(line),
        weights_(static_cast<Real*>(scratch.take(int64_t(block) * Part::kLanes * sizeof(Real)))),
        sums_(static_cast<Real*>(scratch.take(kGroup * line * sizeof(Real)))) {}

  static int64_t bytes(int block, int64_t line) {
    return (int64_t(block) * Part::kLanes + kGroup * line) * int64_t(sizeof(Real)) + 2 * 64;
  }

  void prepare(const Axis<Real>& columns, int64_t x0, int n) {
    columns_ = &columns;
    x0_ = x0;
    n_ = n;
    for (int x = 0; x < n; x += Part::kLanes) {
      if (!narrow(x)) continue;
      const int64_t first = columns.lower[x0 + x];
      for (int i = x; i < x + Part::kLanes; ++i) {
        Real* weights = weights_ + int64_t(i) * Part::kLanes;
        Part(Real(0)).store(weights);
        if (i >= n) continue;
        weights[columns.lower[x0 + i] - first] = 1 - columns.fraction[x0 + i];
        weights[columns.upper[x0 + i] - first] += columns.fraction[x0 + i];
      }
    }
  }

  // out[row * stride + coarse] += the gradient of a row of pixels, from gradient[row * block + pixel]; a row is a class, or
  // a class at one of two coarse rows.
  void add(const Real* gradient, int64_t block, int64_t rows, Real* out, int64_t stride) const {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) group<8>(gradient + row * block, block, out + row * stride, stride);
    if (rows - row >= 4) {
      group<4>(gradient + row * block, block, out + row * stride, stride);
      row += 4;
    }
    for (; row < rows; ++row) group<1>(gradient + row * block, block, out + row * stride, stride);
  }

 private:
  static constexpr int kGroup = 8;  // most rows that share a load of the weights

  bool narrow(int x) const {
    return columns_->upper[x0_ + x + Part::kLanes - 1] - columns_->lower[x0_ + x] < Part::kLanes;
  }

  template <int Group>
  void group(const Real* gradient, int64_t block, Real* out, int64_t stride) const {
    const int64_t first = columns_->lower[x0_], count = columns_->upper[x0_ + n_ - 1] - first + 1;
    std::memset(sums_, 0, Group * line_ * sizeof(Real));
    for (int x = 0; x < n_; x += Part::kLanes) {
      Real* at = sums_ + (columns_->lower[x0_ + x] - first);
      if (narrow(x)) {
        Part sum[Group];
        for (int g = 0; g < Group; ++g) sum[g] = Part::load(at + g * line_);
        for (int i = x; i < x + Part::kLanes; ++i) {
          const Part weights = Part::load(weights_ + int64_t(i) * Part::kLanes);
          for (int g = 0; g < Group; ++g) sum[g] = fma(Part(gradient[g * block + i]), weights, sum[g]);
        }
        for (int g = 0; g < Group; ++g) sum[g].store(at + g * line_);
      } else {
        for (int i = x; i < x + Part::kLanes && i < n_; ++i) {
          const int64_t lower = columns_->lower[x0_ + i] - first, upper = columns_->upper[x0_ + i] - first;
          const Real fraction = columns_->fraction[x0_ + i];
          for (int g = 0; g < Group; ++g) {
            sums_[g * line_ + lower] += (1 - fraction) * gradient[g * block + i];
            sums_[g * line_ + upper] += fraction * gradient[g * block + i];
          }
        }
      }
    }
    for (int g = 0; g < Group; ++g) {
      for (int64_t i = 0; i < count; ++i) out[g * stride + first + i] += sums_[g * line_ + i];
    }
  }

  int64_t line_ = 0;
  Real *weights_ = nullptr, *sums_ = nullptr;
  const Axis<Real>* columns_ = nullptr;
  int64_t x0_ = 0;
  int n_ = 0;
};

}  // namespace hetero::cpu
