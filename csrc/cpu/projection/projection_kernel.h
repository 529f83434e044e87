// The loops of the projection: z = W (f - f0) with its statistics per tile, and back. Included by one translation unit per
// instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "../core/dots.h"
#include "../core/scratch.h"
#include "feature_rows.h"
#include "projection_problem.h"

namespace hetero::cpu {

template <class Real>
static inline Real* take_array(Scratch& scratch, int64_t count) {
  return static_cast<Real*>(scratch.take(count * int64_t(sizeof(Real))));
}

static constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// logits_ [K][tile] of one tile.
template <class Part>
class ProjectTile {
 public:
  using Real = typename Part::Real;
  static constexpr int64_t kLanes = Part::kLanes;

  ProjectTile(const ProjectProblem<Real>& problem, Scratch& scratch)
      : p_(problem),
        pitch_(round_up(p_.tile, std::max<int64_t>(kLanes, kDotColumns))),
        block_(take_array<Real>(scratch, block_size(problem))),
        logits_(take_array<Real>(scratch, p_.classes * pitch_)) {}

  static int64_t bytes(const ProjectProblem<Real>& p) {
    return (block_size(p) + p.classes * round_up(p.tile, 16)) * int64_t(sizeof(Real)) + 2 * 64;
  }

  void run(int64_t index) {
    const int64_t image = index / p_.tiles, p0 = index % p_.tiles * p_.tile;
    const int64_t n = std::min(p_.tile, p_.features.pixels - p0);
    p_.features.channels_last ? project_channels_last(image, p0, n) : project(image, p0, n);
    for (int64_t k = 0; k < p_.classes; ++k) {
      const Real* z = logits_ + k * pitch_;
      std::copy_n(z, n, p_.logits + (image * p_.classes + k) * p_.features.pixels + p0);
      if (p_.statistics) measure(z, n, p_.statistics + (index * p_.classes + k) * 2);
    }
  }

 private:
  static int64_t block_size(const ProjectProblem<Real>& p) {
    return p.features.channels_last ? round_up(p.tile, kDotColumns) * kProjectRun : kProjectChannels * round_up(p.tile, 16);
  }

  void project(int64_t image, int64_t p0, int64_t n) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    for (int64_t c0 = 0; c0 < f.channels; c0 += kProjectChannels) {
      const int64_t count = std::min(kProjectChannels, f.channels - c0);
      read_channels(f, image, c0, count, p0, n, vectors * kLanes, block_, pitch_);
      // The next channels; at the end the next tile's first ones.
      const bool last = c0 + kProjectChannels >= f.channels;
      const int64_t offset = image * f.batch_stride + (last ? p0 + p_.tile : (c0 + kProjectChannels) * f.stride + p0);
      const GemmAhead ahead{static_cast<const char*>(f.data) + offset * element_size(f.dtype), f.stride * element_size(f.dtype),
                            (n * element_size(f.dtype) + 63) / 64};
      gemm<Part, Real>(p_.classes, vectors, count, {p_.weight + c0 * p_.classes, p_.classes, 1}, {block_, pitch_, kLanes},
                       logits_, pitch_, kLanes, c0 > 0, ahead);
    }
  }

  void project_channels_last(int64_t image, int64_t p0, int64_t n) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t columns = round_up(n, kDotColumns);
    std::fill_n(logits_, p_.classes * pitch_, Real(0));
    for (int64_t c0 = 0; c0 < f.channels; c0 += kProjectRun) {
      const int64_t count = std::min(kProjectRun, f.channels - c0), whole = round_up(count, kLanes);
      read_pixels(f, image, c0, count, p0, n, whole, block_, kProjectRun);
      for (int64_t x = n; x < columns; ++x) std::fill_n(block_ + x * kProjectRun, whole, Real(0));
      dots<Part, Real>(p_.classes, columns, whole / kLanes, {p_.weight + c0, p_.padded_channels}, {block_, kProjectRun},
                       logits_, pitch_);
    }
  }

  static void measure(const Real* z, int64_t n, double* out) {
    double sum = 0, squares = 0;
    Part part(Real(0));
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t x = 0; x < whole; x += kLanes) part = part + Part::load(z + x);
    Real lanes[kLanes];
    part.store(lanes);
    for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
    for (int64_t x = whole; x < n; ++x) sum += z[x];
    const double mean = sum / static_cast<double>(n);
    const Real centre = static_cast<Real>(mean);
    part = Part(Real(0));
    for (int64_t x = 0; x < whole; x += kLanes) {
      const Part difference = Part::load(z + x) - Part(centre);
      part = fma(difference, difference, part);
    }
    part.store(lanes);
    for (int64_t i = 0; i < kLanes; ++i) squares += lanes[i];
    for (int64_t x = whole; x < n; ++x) squares += (double(z[x]) - centre) * (double(z[x]) - centre);
    const double off = mean - centre;
    out[0] = mean;
    out[1] = squares - static_cast<double>(n) * off * off;
  }

  const ProjectProblem<Real>& p_;
  const int64_t pitch_;
  Real *const block_, *const logits_;
};

template <class Part>
void project_tiles(const ProjectProblem<typename Part::Real>& problem, int64_t begin, int64_t end) {
  Scratch scratch(ProjectTile<Part>::bytes(problem));
  ProjectTile<Part> tile(problem, scratch);
  for (int64_t index = begin; index < end; ++index) tile.run(index);
}

// Units [begin, end): a unit is a block of channels and a part of all images' tiles.
template <class Part>
void back_units(const ProjectBackProblem<typename Part::Real>& p, int64_t begin, int64_t end) {
  using Real = typename Part::Real;
  constexpr int64_t kLanes = Part::kLanes;
  const FeatureMap<Real>& f = p.features;
  const int64_t width = f.channels_last ? kBackRun : kBackChannels;  // channels of a block
  const int64_t pitch = f.channels_last ? width : round_up(p.tile, 16);
  const int64_t size = f.channels_last ? p.tile * width : width * pitch;
  Scratch scratch(2 * size * int64_t(sizeof(Real)) + 2 * 64);
  Real* const block = take_array<Real>(scratch, size);
  Real* const out = take_array<Real>(scratch, size);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / p.blocks, c0 = unit % p.blocks * width, count = std::min(width, f.channels - c0);
    Real* const sums = p.weight_gradient ? p.weight_gradient + part * p.classes * p.padded_channels + c0 : nullptr;
    for (int64_t k = 0; sums && k < p.classes; ++k) std::fill_n(sums + k * p.padded_channels, width, Real(0));
    const int64_t last = std::min((part + 1) * p.tiles_per_part, f.batch * p.tiles);
    for (int64_t tile = part * p.tiles_per_part; tile < last; ++tile) {
      const int64_t image = tile / p.tiles, p0 = tile % p.tiles * p.tile, n = std::min(p.tile, f.pixels - p0);
      const Real* gradient = p.gradient + image * p.classes * p.padded_pixels + p0;
      const int64_t vectors = (n + kLanes - 1) / kLanes;
      if (f.channels_last) {
        if (sums) {
          read_pixels(f, image, c0, count, p0, n, width, block, width);
          gemm<Part, Real>(p.classes, width / kLanes, n, {gradient, 1, p.padded_pixels}, {block, width, kLanes}, sums,
                           p.padded_channels, kLanes, true);
        }
        if (p.features_gradient) {
          gemm<Part, Real>(n, width / kLanes, p.classes, {gradient, p.padded_pixels, 1},
                           {p.weight + c0, p.padded_channels, kLanes}, out, width, kLanes, false);
          for (int64_t x = 0; x < n; ++x) {
            write_row<Part>(out + x * width, count, f.dtype, p.features_gradient, (image * f.pixels + p0 + x) * f.channels + c0);
          }
        }
        continue;
      }
      if (sums) {
        read_channels(f, image, c0, count, p0, n, vectors * kLanes, block, pitch);
        for (int64_t c = count; c < width; ++c) std::fill_n(block + c * pitch, vectors * kLanes, Real(0));
        dots<Part, Real>(p.classes, width, vectors, {gradient, p.padded_pixels}, {block, pitch}, sums, p.padded_channels);
      }
      if (p.features_gradient) {
        gemm<Part, Real>(count, vectors, p.classes, {p.weight + c0, p.padded_channels, 1}, {gradient, p.padded_pixels, kLanes}, out,
                         pitch, kLanes, false);
        for (int64_t c = 0; c < count; ++c) {
          write_row<Part>(out + c * pitch, n, f.dtype, p.features_gradient, (image * f.channels + c0 + c) * f.pixels + p0);
        }
      }
    }
  }
}

// Rows [begin, end) of all images' classes.
template <class Real>
static void logit_gradient_rows(const LogitGradient<Real>& p, int64_t begin, int64_t end) {
  MagnitudeBits<Real> unused = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / p.classes, k = row % p.classes;
    Real* __restrict__ out = p.out + row * p.padded_pixels;
    std::fill(out + p.pixels, out + p.padded_pixels, Real(0));
    if (p.given) {
      load_logits(p.given, p.dtype, image * p.stride[0] + k * p.stride[1], p.stride[2], static_cast<int>(p.pixels), Real(1), out,
                  unused);
    } else {
      std::fill_n(out, p.pixels, Real(0));
    }
    if (p.slope == nullptr) continue;
    const Real* __restrict__ z = p.logits + row * p.pixels;
    const Real constant = p.constant[k], mean = p.mean[k], slope = p.slope[k];
    for (int64_t x = 0; x < p.pixels; ++x) out[x] += slope * (z[x] - mean) + constant;
  }
}

template <class Part>
constexpr ProjectionKernels<typename Part::Real> make_projection_kernels() {
  return {project_tiles<Part>, back_units<Part>, logit_gradient_rows<typename Part::Real>, Part::kLanes};
}

}  // namespace hetero::cpu
