// The gradient by what logits mean, dy, as that by the logits, dz, and the sums that scale and shift get. Everything here is
// `static`: each instruction set compiles its own.
#pragma once

#include "../core/rows.h"
#include "../core/scratch.h"
#include "problem.h"

namespace hetero::cpu {

// A row: dy becomes dz = scale dy, 0 where ReLU was; adds dy z and dy to `sums` [2, kParts], 0 where dy is, whatever z is.
template <class Real, int kParts>
static inline void normalize_row(const Normalization<Real>& n, int64_t c, const Real* __restrict__ z, int64_t width,
                                 Real* __restrict__ gradient, double* __restrict__ sums) {
  const Real scale = n.scale[c], shift = n.shift[c];
  const bool relu = n.relu;
  const auto take = [&](int64_t x, int64_t part) {
    const Real dy = relu && scale * z[x] + shift <= 0 ? Real(0) : gradient[x];
    const bool reached = dy != 0;
    sums[part] += reached ? double(dy) * double(z[x]) : 0.0;
    sums[kParts + part] += dy;
    gradient[x] = reached ? scale * dy : Real(0);
  };
  int64_t x = 0;
  for (; x + kParts <= width; x += kParts) {
    for (int64_t part = 0; part < kParts; ++part) take(x + part, part);
  }
  for (int64_t part = 0; x < width; ++x, ++part) take(x, part);
}

// Classes [begin, end): each is one thread's, so that sums do not depend on the number of threads.
template <class Real>
static void normalize_gradient(const NormalizedGradient<Real>& p, int64_t begin, int64_t end) {
  constexpr int kParts = 8;
  const Network<Real>& network = p.network;
  Scratch scratch(network.width * int64_t(sizeof(Real)));
  Real* const z = static_cast<Real*>(scratch.take(network.width * int64_t(sizeof(Real))));
  MagnitudeBits<Real> unused = 0;
  for (int64_t c = begin; c < end; ++c) {
    double sums[2 * kParts] = {};
    for (int64_t row = 0; row < p.batch * network.height; ++row) {
      const int64_t image = row / network.height, y = row % network.height;
      load_logits(network.logits, network.dtype, image * network.stride[0] + c * network.stride[1] + y * network.stride[2],
                  network.stride[3], static_cast<int>(network.width), Real(1), z, unused);
      normalize_row<Real, kParts>(*network.normalization, c, z, network.width,
                                  network.gradient + ((image * p.classes + c) * network.height + y) * network.width, sums);
    }
    for (int i = 0; i < 2; ++i) {
      double sum = 0;
      for (int part = 0; part < kParts; ++part) sum += sums[i * kParts + part];
      p.sums[i * p.classes + c] = static_cast<Real>(sum);
    }
  }
}

}  // namespace hetero::cpu
