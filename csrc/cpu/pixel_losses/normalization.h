// The gradient by what logits mean, dy, as that by the logits, dz, and the sums that scale and shift get.
#pragma once

#include <algorithm>

#include "../core/rows.h"
#include "../core/scratch.h"
#include "../core/vec.h"
#include "problem.h"

namespace hetero::cpu {

// A row: dy becomes dz = scale dy, 0 where ReLU was; adds dy z and dy to `sums`, 0 where dy is, whatever z is.
template <class Part>
class NormalizedRow {
 public:
  using Real = typename Part::Real;
  static constexpr int kLanes = Part::kLanes;

  NormalizedRow(const Normalization<Real>& n, int64_t c) : gradient_(Part(n.scale[c]), Part(n.shift[c]), n.relu) {}

  void run(const Real* z, int64_t width, Real* gradient, double* sums) {
    gradient_.by_scale = gradient_.by_shift = Part(Real(0));
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      gradient_.take(Part::load(z + x), Part::load(gradient + x)).store(gradient + x);
    }
    if (x < width) {
      Real rest[2][kLanes] = {};
      std::copy(z + x, z + width, rest[0]);
      std::copy(gradient + x, gradient + width, rest[1]);
      gradient_.take(Part::load(rest[0]), Part::load(rest[1])).store(rest[1]);
      std::copy_n(rest[1], width - x, gradient + x);
    }
    Real lanes[2][kLanes];
    gradient_.by_scale.store(lanes[0]);
    gradient_.by_shift.store(lanes[1]);
    for (int i = 0; i < 2; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) sums[i] += lanes[i][lane];
    }
  }

 private:
  NormalizationGradient<Part> gradient_;
};

// Classes [begin, end): each is one thread's, so that sums do not depend on the number of threads.
template <class Part>
void normalize_gradient(const NormalizedGradient<typename Part::Real>& p, int64_t begin, int64_t end) {
  using Real = typename Part::Real;
  const Network<Real>& network = p.network;
  Scratch scratch(network.width * int64_t(sizeof(Real)));
  Real* const z = take_array<Real>(scratch, network.width);
  MagnitudeBits<Real> unused = 0;
  for (int64_t c = begin; c < end; ++c) {
    NormalizedRow<Part> normalized(*network.normalization, c);
    double sums[2] = {0, 0};
    for (int64_t row = 0; row < p.batch * network.height; ++row) {
      const int64_t image = row / network.height, y = row % network.height;
      load_logits(network.logits, network.dtype, image * network.stride[0] + c * network.stride[1] + y * network.stride[2],
                  network.stride[3], static_cast<int>(network.width), Real(1), z, unused);
      normalized.run(z, network.width, network.gradient + ((image * p.classes + c) * network.height + y) * network.width, sums);
    }
    for (int i = 0; i < 2; ++i) p.sums[i * p.classes + c] = static_cast<Real>(sums[i]);
  }
}

}  // namespace hetero::cpu
