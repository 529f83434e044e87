#include "projection.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../core/large_pages.h"
#include "dispatch.h"

namespace hetero::cpu {

namespace {

constexpr int64_t kFewTiles = 32;  // that all images have together at least, where they have the pixels
constexpr int64_t kUnits = 32;     // that a backward has at least

// Tiles of `most` pixels, smaller ones where there would be few.
PixelTiles cut(int64_t batch, int64_t pixels, int64_t most) {
  return {batch, pixels, std::min(most, round_up(std::max<int64_t>(1, batch * pixels / kFewTiles), 64))};
}

template <class Real>
Real* array(const Runtime& runtime, int64_t count) {
  return static_cast<Real*>(runtime.allocate(std::max<int64_t>(count, 1) * int64_t(sizeof(Real))));
}

template <class Real, class Use>
void with_stored(const FeatureMap<Real>& f, Use use) {
  switch (f.dtype) {
    case DType::kFloat:
      return use(static_cast<const float*>(f.data), [](float x) { return double(x); });
    case DType::kBFloat16:
      return use(static_cast<const uint16_t*>(f.data), [](uint16_t x) { return double(bfloat16_to_float(x)); });
    case DType::kHalf:
      return use(static_cast<const uint16_t*>(f.data), [](uint16_t x) { return double(half_to_float(x)); });
    case DType::kDouble:
      return use(static_cast<const double*>(f.data), [](double x) { return x; });
  }
}

// The features less their pilot, zeros where there is none.
template <class Real>
FeatureMap<Real> with_pilot(FeatureMap<Real> f, const Runtime& runtime) {
  if (f.pilot) return f;
  Real* zeros = array<Real>(runtime, f.channels);
  std::fill_n(zeros, f.channels, Real(0));
  f.pilot = zeros;
  return f;
}

// [K, padded] of [K, channels].
template <class Real>
Real* pad_rows(const Real* weight, int64_t classes, int64_t channels, int64_t padded, const Runtime& runtime) {
  Real* out = array<Real>(runtime, classes * padded);
  for (int64_t k = 0; k < classes; ++k) {
    std::copy_n(weight + k * channels, channels, out + k * padded);
    std::fill(out + k * padded + channels, out + (k + 1) * padded, Real(0));
  }
  return out;
}

}  // namespace

template <class Real>
void find_pilot(const FeatureMap<Real>& f, Real* pilot, const Runtime& runtime) {
  // Runs of neighbouring pixels, spread over batch and image.
  constexpr int64_t kRuns = 4, kRun = 16;
  const int64_t run = f.batch ? std::min(kRun, f.pixels) : 0;
  const auto start = [&](int64_t r) {
    const int64_t p0 = std::min((2 * r + 1) * f.pixels / (2 * kRuns), f.pixels - run);
    return r * f.batch / kRuns * f.batch_stride + p0 * (f.channels_last ? f.stride : 1);
  };
  runtime.parallel(f.channels, [&](int64_t begin, int64_t end) {
    std::vector<std::array<double, kRuns>> sums(end - begin, std::array<double, kRuns>{});
    with_stored(f, [&](auto* data, auto convert) {
      if (f.channels_last) {
        for (int64_t i = 0; i < kRuns * run; ++i) {
          const auto* pixel = data + start(i / run) + i % run * f.stride;
          for (int64_t c = begin; c < end; ++c) sums[c - begin][i / run] += convert(pixel[c]);
        }
      } else {
        constexpr int64_t kAhead = 8;  // channels: each is some cache misses that need not wait for each other
        for (int64_t c = begin; c < end; ++c) {
          for (int64_t r = 0; r < kRuns; ++r) {
            const auto* first = data + start(r) + c * f.stride;
            __builtin_prefetch(first + kAhead * f.stride);
            for (int64_t i = 0; i < run; ++i) sums[c - begin][r] += convert(first[i]);
          }
        }
      }
    });
    // The median of the runs: one pixel that is far from all others does not move it.
    for (int64_t c = begin; c < end; ++c) {
      auto& each = sums[c - begin];
      const auto finite = std::partition(each.begin(), each.end(), [](double sum) { return std::isfinite(sum); });
      const int64_t count = run ? finite - each.begin() : 0;
      std::sort(each.begin(), finite);
      const double middle = count ? (each[(count - 1) / 2] + each[count / 2]) / 2 / static_cast<double>(run) : 0;
      pilot[c] = std::isfinite(middle) ? static_cast<Real>(middle) : Real(0);
    }
  });
}

template <class Real>
void project(const FeatureMap<Real>& f, const Real* weight, int64_t classes, Real* logits, double* statistics,
             const Runtime& runtime) {
  const ProjectionKernels<Real>& kernels = projection_kernels<Real>();
  ProjectProblem<Real> p{};
  p.features = with_pilot(f, runtime);
  p.classes = classes;
  p.logits = logits;
  p.tiles = cut(f.batch, f.pixels, f.channels_last ? kProjectLastPixels : kProjectPixels);
  if (f.channels_last) {
    p.padded_channels = round_up(f.channels, kernels.lanes);
    p.weight = pad_rows(weight, classes, f.channels, p.padded_channels, runtime);
  } else {
    Real* transposed = array<Real>(runtime, f.channels * classes);
    constexpr int64_t kBlock = 16;
    runtime.parallel((f.channels + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t last = std::min((block + 1) * kBlock, f.channels);
        for (int64_t k = 0; k < classes; ++k) {
          for (int64_t c = block * kBlock; c < last; ++c) transposed[c * classes + k] = weight[k * f.channels + c];
        }
      }
    });
    p.weight = transposed;
  }
  const int64_t tiles = p.tiles.count();
  if (statistics) p.statistics = array<double>(runtime, tiles * classes * 2);
  runtime.parallel(tiles, [&](int64_t begin, int64_t end) { kernels.project(p, begin, end); });
  if (!statistics) return;
  const auto combine = [&](int64_t k) {
    double count = 0, mean = 0, squares = 0, offset = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const double n = static_cast<double>(p.tiles.at(tile).total());
      const double* part = p.statistics + (tile * classes + k) * 2;
      const double difference = part[0] - mean;
      mean += std::isfinite(difference) ? difference * (n / (count + n)) : part[0];  // infinity stays one
      squares += part[1] + difference * difference * (count * n / (count + n));
      count += n;
    }
    for (int64_t c = 0; f.pilot && c < f.channels; ++c) offset += double(weight[k * f.channels + c]) * f.pilot[c];
    const double values[4] = {count, mean, squares, offset};
    for (int64_t i = 0; i < 4; ++i) statistics[i * classes + k] = values[i];
  };
  runtime.parallel(classes, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) combine(k);
  });
}

template <class Real>
void project_back(const FeatureMap<Real>& f, const Real* weight, int64_t classes, const LogitsAndGradients<Real>& logits,
                  void* features_gradient, Real* weight_gradient, const Runtime& runtime) {
  const ProjectionKernels<Real>& kernels = projection_kernels<Real>();
  ProjectBackProblem<Real> p{};
  p.features = with_pilot(f, runtime);
  p.classes = classes;
  p.tiles = {f.batch, f.pixels, f.channels_last ? kBackLastPixels : kBackPixels};
  const int64_t tiles = p.tiles.count();

  LogitGradient<Real> z{};
  z.given = logits.given;
  z.dtype = logits.dtype;
  std::copy_n(logits.stride, 3, z.stride);
  z.logits = logits.logits;
  z.classes = classes;
  z.pixels = f.pixels;
  z.tiles = p.tiles;
  z.pitch = f.channels_last ? kBackLastPitch : kBackPitch;
  z.out = array<Real>(runtime, tiles * classes * z.pitch);
  if (f.channels_last && weight_gradient) z.by_pixel = array<Real>(runtime, f.batch * f.pixels * classes);
  std::vector<Real> coefficients(3 * classes);
  if (logits.mean) {
    const double n = static_cast<double>(f.batch * f.pixels);
    for (int64_t k = 0; k < classes; ++k) {
      coefficients[k] = static_cast<Real>(logits.mean_gradient[k] / n);
      coefficients[classes + k] = static_cast<Real>(logits.mean[k]);
      coefficients[2 * classes + k] = static_cast<Real>(2 * logits.squares_gradient[k]);
    }
    z.constant = coefficients.data();
    z.mean = z.constant + classes;
    z.slope = z.mean + classes;
  }
  runtime.parallel(tiles, [&](int64_t begin, int64_t end) { kernels.logit_gradient(z, begin, end); });

  p.block = f.channels_last ? round_up(std::clamp<int64_t>(f.channels / 4, 1, kBackRuns * kBackRun), kBackRun) : kBackChannels;
  p.padded_channels = round_up(f.channels, p.block);
  p.blocks = p.padded_channels / p.block;
  if (f.channels_last) {
    Real* panels = array<Real>(runtime, classes * p.padded_channels);
    std::fill_n(panels, classes * p.padded_channels, Real(0));
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t c = 0; c < f.channels; ++c) panels[(c / kBackRun * classes + k) * kBackRun + c % kBackRun] = weight[k * f.channels + c];
    }
    p.weight = panels;
  } else {
    p.weight = pad_rows(weight, classes, f.channels, p.padded_channels, runtime);
  }
  p.gradient = z.out;
  p.by_pixel = z.by_pixel;
  const int64_t wanted = std::clamp<int64_t>((kUnits + p.blocks - 1) / p.blocks, 1, std::max<int64_t>(tiles, 1));
  p.tiles_per_part = std::max<int64_t>(1, (tiles + wanted - 1) / wanted);
  const int64_t parts = (tiles + p.tiles_per_part - 1) / p.tiles_per_part;
  p.features_gradient = features_gradient;
  if (weight_gradient) p.weight_gradient = array<Real>(runtime, parts * classes * p.padded_channels);
  if (features_gradient) {
    prefer_large_pages(features_gradient, f.batch * f.channels * f.pixels * element_size(f.dtype), runtime);
  }
  const auto run = [&] {
    runtime.parallel(parts * p.blocks, [&](int64_t begin, int64_t end) { kernels.back(p, begin, end); });
  };
  // The parts, in order; whether every sum is a number.
  std::vector<char> finite(classes);
  const auto gather = [&] {
    const auto add = [&](int64_t k) {
      Real* out = weight_gradient + k * f.channels;
      std::fill_n(out, f.channels, Real(0));
      for (int64_t part = 0; part < parts; ++part) {
        const Real* from = p.weight_gradient + (part * classes + k) * p.padded_channels;
        for (int64_t c = 0; c < f.channels; ++c) out[c] += from[c];
      }
      if (logits.mean && f.pilot) {
        for (int64_t c = 0; c < f.channels; ++c) out[c] += static_cast<Real>(logits.offset_gradient[k] * f.pilot[c]);
      }
      finite[k] = std::all_of(out, out + f.channels, [](Real x) { return std::isfinite(x); });
    };
    runtime.parallel(classes, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) add(k);
    });
    return std::all_of(finite.begin(), finite.end(), [](char x) { return x != 0; });
  };
  run();
  if (!weight_gradient || gather()) return;
  // 0 * NaN: once more, without the features that no gradient reaches.
  uint8_t* unreached = array<uint8_t>(runtime, f.batch * f.pixels);
  std::fill_n(unreached, f.batch * f.pixels, uint8_t(1));
  for (int64_t row = 0; row < tiles * classes; ++row) {
    const PixelTile t = p.tiles.at(row / classes);
    uint8_t* at = unreached + t.image * f.pixels + t.p0;
    for (int64_t x = 0; x < t.total(); ++x) at[x] = at[x] && z.out[row * z.pitch + x] == 0;
  }
  p.features.unreached = unreached;
  p.features_gradient = nullptr;
  run();
  gather();
}

#define HK_INSTANTIATE(Real)                                                                                                  \
  template void find_pilot(const FeatureMap<Real>&, Real*, const Runtime&);                                                   \
  template void project(const FeatureMap<Real>&, const Real*, int64_t, Real*, double*, const Runtime&);                       \
  template void project_back(const FeatureMap<Real>&, const Real*, int64_t, const LogitsAndGradients<Real>&, void*, Real*, \
                             const Runtime&);
HK_INSTANTIATE(float)
HK_INSTANTIATE(double)
#undef HK_INSTANTIATE

}  // namespace hetero::cpu
