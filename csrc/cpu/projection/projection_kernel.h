// The loops of the projection: z = W (f - f0) with its statistics per tile, and back. Included by one translation unit per
// instruction set.
#pragma once

#include <algorithm>

#include "../core/panel.h"
#include "../core/scratch.h"
#include "feature_rows.h"
#include "projection_problem.h"

namespace hetero::cpu {

// logits_ [K][tile] of one tile.
template <class Part>
class ProjectTile {
 public:
  using Real = typename Part::Real;
  static constexpr int64_t kLanes = Part::kLanes;

  ProjectTile(const ProjectProblem<Real>& problem, Scratch& scratch)
      : p_(problem),
        pitch_(p_.features.channels_last ? round_up(p_.tiles.size(), 16) : kProjectPitch),
        block_(take_array<Real>(scratch, block_size(problem))),
        logits_(take_array<Real>(scratch, p_.classes * pitch_)) {}

  static int64_t bytes(const ProjectProblem<Real>& p) {
    return (block_size(p) + p.classes * kProjectPitch) * int64_t(sizeof(Real)) + 2 * 64;
  }

  void run(int64_t index) {
    const PixelTile t = p_.tiles.at(index);
    p_.features.channels_last ? project_channels_last(t) : project(t);
    for (int64_t k = 0; k < p_.classes; ++k) {
      const Real* z = logits_ + k * pitch_;
      for (int64_t i = 0; i < t.images; ++i) {
        std::copy_n(z + i * t.n, t.n, p_.logits + ((t.image + i) * p_.classes + k) * p_.features.pixels + t.p0);
      }
      if (p_.statistics) measure(z, t.total(), p_.statistics + (index * p_.classes + k) * 2);
    }
  }

 private:
  static int64_t block_size(const ProjectProblem<Real>& p) {
    return p.features.channels_last ? round_up(p.tiles.size(), kDotColumns) * kProjectLastPitch : kProjectChannels * kProjectPitch;
  }

  void project(const PixelTile& t) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t n = t.total(), vectors = (n + kLanes - 1) / kLanes;
    for (int64_t c0 = 0; c0 < f.channels; c0 += kProjectChannels) {
      const int64_t count = std::min(kProjectChannels, f.channels - c0);
      // The next channels; at the end the next tile's first ones.
      const bool last = c0 + kProjectChannels >= f.channels;
      const int64_t bytes = element_size(f.dtype), next_p0 = last ? t.p0 + p_.tiles.size() : t.p0;
      const int64_t next = t.image * f.batch_stride + (last ? 0 : c0 + kProjectChannels) * f.stride + next_p0;
      const Ahead ahead{static_cast<const char*>(f.data) + next * bytes, f.stride * bytes, 64, (n * bytes + 63) / 64};
      PanelArguments<Real> product{count, p_.weight + c0 * p_.classes, p_.classes, block_, logits_, pitch_, c0 > 0};
      if (const Real* rows = n % kLanes ? nullptr : find_features(f, t, c0)) {
        product.source = {rows, f.stride, f.pilot + c0, block_};
        panels<Part, kPanelPitch<Part>, Real, Panel::kFill>(p_.classes, vectors, product, ahead);
      } else {
        read_channels<Part>(f, t, c0, count, vectors * kLanes, block_, kProjectPitch);
        panels<Part, kProjectPitch>(p_.classes, vectors, product, ahead);
      }
    }
  }

  void project_channels_last(const PixelTile& t) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t n = t.total(), columns = round_up(n, kDotColumns);
    std::fill_n(logits_, p_.classes * pitch_, Real(0));
    for (int64_t c0 = 0; c0 < f.channels; c0 += kProjectRun) {
      const int64_t count = std::min(kProjectRun, f.channels - c0), whole = round_up(count, kLanes);
      const bool last = c0 + kProjectRun >= f.channels;
      const int64_t bytes = element_size(f.dtype), next_p0 = last ? t.p0 + p_.tiles.size() : t.p0;
      const int64_t next = t.image * f.batch_stride + next_p0 * f.stride + (last ? 0 : c0 + kProjectRun);
      const Ahead ahead{static_cast<const char*>(f.data) + next * bytes, 64 * bytes / int64_t(sizeof(Real)), f.stride * bytes, n};
      DotArguments<Real> product{whole / kLanes, p_.weight + c0, p_.padded_channels, block_, logits_, pitch_};
      const Real* rows = n == columns && count == whole ? find_features(f, t, c0) : nullptr;
      if (rows) {
        product.source = {rows, f.stride, f.pilot + c0, block_};
        dots<Part, kProjectLastPitch, Panel::kFillColumns>(p_.classes, columns, product, ahead);
      } else {
        read_pixels<Part>(f, t, c0, count, whole, block_, kProjectLastPitch);
        for (int64_t x = n; x < columns; ++x) std::fill_n(block_ + x * kProjectLastPitch, whole, Real(0));
        dots<Part, kProjectLastPitch, Panel::kPlain>(p_.classes, columns, product, ahead);
      }
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

// Gradients of a block of channels, tile by tile.
template <class Part>
class BackBlock {
 public:
  using Real = typename Part::Real;
  static constexpr int64_t kLanes = Part::kLanes;

  BackBlock(const ProjectBackProblem<Real>& problem, Scratch& scratch)
      : p_(problem), block_(take_array<Real>(scratch, size(problem))), out_(take_array<Real>(scratch, size(problem))) {}

  static int64_t bytes(const ProjectBackProblem<Real>& p) { return 2 * size(p) * int64_t(sizeof(Real)) + 2 * 64; }

  // A unit is a block of channels and a part of the tiles.
  void run(int64_t unit) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t run = f.channels_last ? kBackRun : kBackChannels;
    const int64_t part = unit / p_.blocks, begin = unit % p_.blocks * p_.block, end = std::min(begin + p_.block, f.channels);
    Real* const sums = p_.weight_gradient ? p_.weight_gradient + part * p_.classes * p_.padded_channels : nullptr;
    for (int64_t k = 0; sums && k < p_.classes; ++k) std::fill_n(sums + k * p_.padded_channels + begin, p_.block, Real(0));
    const int64_t last = std::min((part + 1) * p_.tiles_per_part, p_.tiles.count());
    for (int64_t tile = part * p_.tiles_per_part; tile < last; ++tile) {
      for (c0_ = begin; c0_ < end; c0_ += run) {
        count_ = std::min(run, f.channels - c0_);
        sums_ = sums ? sums + c0_ : nullptr;
        f.channels_last ? add_channels_last(tile, p_.tiles.at(tile), begin, end) : add(tile, p_.tiles.at(tile));
      }
    }
  }

 private:
  static int64_t size(const ProjectBackProblem<Real>& p) {
    return p.features.channels_last ? kBackLastPixels * kBackRun : kBackChannels * kBackPitch;
  }

  void add(int64_t tile, const PixelTile& t) {
    const FeatureMap<Real>& f = p_.features;
    const Real* gradient = p_.gradient + tile * p_.classes * kBackPitch;
    const int64_t vectors = (t.total() + kLanes - 1) / kLanes;
    if (sums_) {
      // The same channels' next pixels.
      const int64_t bytes = element_size(f.dtype), next = t.image * f.batch_stride + c0_ * f.stride + t.p0 + p_.tiles.size();
      const Ahead ahead{static_cast<const char*>(f.data) + next * bytes, 64 * bytes / int64_t(sizeof(Real)), f.stride * bytes, count_};
      DotArguments<Real> product{vectors, gradient, kBackPitch, block_, sums_, p_.padded_channels};
      const Real* rows = count_ == kBackChannels && t.n % kLanes == 0 ? find_features(f, t, c0_) : nullptr;
      if (rows) {
        product.source = {rows, f.stride, f.pilot + c0_, block_};
        dots<Part, kBackPitch, Panel::kFill>(p_.classes, kBackChannels, product, ahead);
      } else {
        read_channels<Part>(f, t, c0_, count_, vectors * kLanes, block_, kBackPitch);
        for (int64_t c = count_; c < kBackChannels; ++c) std::fill_n(block_ + c * kBackPitch, vectors * kLanes, Real(0));
        dots<Part, kBackPitch, Panel::kPlain>(p_.classes, kBackChannels, product, ahead);
      }
    }
    if (!p_.features_gradient) return;
    PanelArguments<Real> product{p_.classes, p_.weight + c0_, p_.padded_channels, gradient, out_, kBackPitch, false};
    if (Real* rows = find_gradient<Part>(p_.features_gradient, f, t, c0_)) {
      product.c = rows;
      product.c_row = f.pixels;
      panels<Part, kBackPitch, Real, Panel::kStream>(count_, vectors, product);
      return;
    }
    panels<Part, kBackPitch>(count_, vectors, product);
    for (int64_t c = 0; c < count_; ++c) {
      for (int64_t i = 0; i < t.images; ++i) {
        write_row<Part>(out_ + c * kBackPitch + i * t.n, t.n, f.dtype, p_.features_gradient,
                        ((t.image + i) * f.channels + c0_ + c) * f.pixels + t.p0);
      }
    }
  }

  // Of a unit's channels [begin, end).
  void add_channels_last(int64_t tile, const PixelTile& t, int64_t begin, int64_t end) {
    const FeatureMap<Real>& f = p_.features;
    const int64_t n = t.total(), first = t.image * f.pixels + t.p0;
    if (sums_) {
      // The same pixels' next channels; at the end the next pixels' first ones.
      const bool last = c0_ + kBackRun >= end;
      const int64_t bytes = element_size(f.dtype), next_p0 = last ? t.p0 + p_.tiles.size() : t.p0;
      const int64_t next = t.image * f.batch_stride + next_p0 * f.stride + (last ? begin : c0_ + kBackRun);
      const Ahead ahead{static_cast<const char*>(f.data) + next * bytes, f.stride * bytes, 64, (count_ * bytes + 63) / 64};
      PanelArguments<Real> product{n, p_.by_pixel + first * p_.classes, p_.classes, block_, sums_, p_.padded_channels, true};
      if (const Real* rows = count_ == kBackRun ? find_features(f, t, c0_) : nullptr) {
        product.source = {rows, f.stride, f.pilot + c0_, block_};
        panels<Part, kPanelPitch<Part>, Real, Panel::kFillColumns>(p_.classes, kBackRun / kLanes, product, ahead);
      } else {
        read_pixels<Part>(f, t, c0_, count_, kBackRun, block_, kBackRun);
        panels<Part, kBackRun>(p_.classes, kBackRun / kLanes, product, ahead);
      }
    }
    if (!p_.features_gradient) return;
    PanelArguments<Real> product{
        p_.classes, p_.gradient + tile * p_.classes * kBackLastPitch, kBackLastPitch, p_.weight + c0_ * p_.classes, out_, kBackRun, false};
    if (Real* rows = find_gradient<Part>(p_.features_gradient, f, t, c0_)) {
      product.c = rows;
      product.c_row = f.channels;
      panels<Part, kBackRun, Real, Panel::kStream>(n, count_ / kLanes, product);
      return;
    }
    panels<Part, kBackRun>(n, kBackRun / kLanes, product);
    for (int64_t x = 0; x < n; ++x) {
      write_row<Part>(out_ + x * kBackRun, count_, f.dtype, p_.features_gradient, (first + x) * f.channels + c0_);
    }
  }

  const ProjectBackProblem<Real>& p_;
  Real *const block_, *const out_;
  Real* sums_ = nullptr;
  int64_t c0_ = 0, count_ = 0;
};

template <class Part>
void back_units(const ProjectBackProblem<typename Part::Real>& problem, int64_t begin, int64_t end) {
  Scratch scratch(BackBlock<Part>::bytes(problem));
  BackBlock<Part> block(problem, scratch);
  for (int64_t unit = begin; unit < end; ++unit) block.run(unit);
}

template <class Real>
static void logit_gradient_tiles(const LogitGradient<Real>& p, int64_t begin, int64_t end) {
  MagnitudeBits<Real> unused = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const PixelTile t = p.tiles.at(tile);
    const int64_t n = t.n, total = t.total(), first = t.image * p.pixels + t.p0;
    for (int64_t k = 0; k < p.classes; ++k) {
      Real* __restrict__ row = p.out + (tile * p.classes + k) * p.pitch;
      std::fill(row + (p.given ? total : 0), row + p.pitch, Real(0));
      for (int64_t i = 0; i < t.images; ++i) {
        Real* __restrict__ out = row + i * n;
        if (p.given) {
          const int64_t offset = (t.image + i) * p.stride[0] + k * p.stride[1] + t.p0 * p.stride[2];
          load_logits(p.given, p.dtype, offset, p.stride[2], static_cast<int>(n), Real(1), out, unused);
        }
        if (p.slope) {
          const Real* __restrict__ z = p.logits + ((t.image + i) * p.classes + k) * p.pixels + t.p0;
          const Real constant = p.constant[k], mean = p.mean[k], slope = p.slope[k];
          for (int64_t x = 0; x < n; ++x) out[x] += slope * (z[x] - mean) + constant;
        }
      }
      for (int64_t x = 0; p.by_pixel && x < total; ++x) p.by_pixel[(first + x) * p.classes + k] = row[x];
    }
  }
}

template <class Part>
constexpr ProjectionKernels<typename Part::Real> make_projection_kernels() {
  return {project_tiles<Part>, back_units<Part>, logit_gradient_tiles<typename Part::Real>, Part::kLanes};
}

}  // namespace hetero::cpu
