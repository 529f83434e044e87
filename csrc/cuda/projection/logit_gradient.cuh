// The gradient of raw logits, formed on its way from memory.
#pragma once

#include "../core/memory.cuh"
#include "projection.h"

namespace hetero::cuda {

class LogitGradientReader {
 public:
  // For up to `most` classes at a time.
  HK_DEVICE LogitGradientReader(const LogitGradient& gradient, int classes, int64_t pixels, int most, SharedAllocator& memory)
      : gradient_(gradient), classes_(classes), pixels_(pixels), coefficients_(memory.take<float>(3 * most)) {}

  // Classes [first, first + count); after a barrier that follows.
  HK_DEVICE void open(int first, int count) {
    first_ = first;
    if (!gradient_.by_statistics) return;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const double* by = gradient_.by_statistics + first + i;
      coefficients_.set(3 * i, static_cast<float>(read(by + classes_) * gradient_.inverse));
      coefficients_.set(3 * i + 1, static_cast<float>(read(gradient_.statistics + classes_ + first + i)));
      coefficients_.set(3 * i + 2, static_cast<float>(2 * read(by + 2 * classes_)));
    }
  }

  // Where the k-th of them has a pixel of an image; the next one is a number of pixels further on.
  HK_DEVICE int64_t place(int k, int64_t image, int64_t pixel) const { return (image * classes_ + first_ + k) * pixels_ + pixel; }

  // Of the k-th of them, at its place.
  HK_DEVICE float at(int k, int64_t place) const {
    const float given = gradient_.given ? read(gradient_.given + place) : 0.f;
    if (!gradient_.by_statistics) return given;
    const float off = read(gradient_.logits + place) - coefficients_[3 * k + 1];
    return given + ::fmaf(coefficients_[3 * k + 2], off, coefficients_[3 * k]);
  }

 private:
  const LogitGradient& gradient_;
  const int classes_;
  const int64_t pixels_;
  const Shared<float> coefficients_;
  int first_ = 0;
};

}  // namespace hetero::cuda
