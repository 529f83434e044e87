// Rows of features, read as the loops want them and written as they came. Everything here is `static` or a template of a vector:
// each instruction set compiles its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../core/vec.h"
#include "projection_problem.h"

namespace hetero::cpu {

// Elements [0, n) of a row, each less `pilot[i * pilot_step]`, as numbers of the compute dtype.
template <class Real, class Stored, class Convert>
static inline void read_row(const Stored* __restrict__ in, int64_t n, const Real* __restrict__ pilot, bool per_element, Real* __restrict__ out,
                            Convert convert) {
  if (per_element) {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(in[i]) - pilot[i];
  } else {
    const Real one = *pilot;
    for (int64_t i = 0; i < n; ++i) out[i] = convert(in[i]) - one;
  }
}

// `length` elements from `offset` on, then zeros up to `whole`.
template <class Real>
static inline void read_features(const FeatureMap<Real>& f, int64_t offset, int64_t length, int64_t whole, const Real* pilot,
                                 bool per_element, Real* out) {
  const char* row = static_cast<const char*>(f.data) + offset * element_size(f.dtype);
  const auto read = [&]<class Stored>(Stored, auto convert) {
    read_row<Real>(reinterpret_cast<const Stored*>(row), length, pilot, per_element, out, convert);
  };
  const auto exactly = [](auto x) { return static_cast<Real>(x); };
  switch (f.dtype) {
    case DType::kFloat:
      if (f.rounding == DType::kBFloat16) {
        read(float(), [](float x) { return static_cast<Real>(bfloat16_to_float(float_to_bfloat16(x))); });
      } else if (f.rounding == DType::kHalf) {
        read(float(), [](float x) { return static_cast<Real>(half_to_float(float_to_half(x))); });
      } else {
        read(float(), exactly);
      }
      break;
    case DType::kBFloat16:
      if (f.rounding == DType::kHalf) {
        read(uint16_t(), [](uint16_t x) { return static_cast<Real>(half_to_float(float_to_half(bfloat16_to_float(x)))); });
      } else {
        read(uint16_t(), [](uint16_t x) { return static_cast<Real>(bfloat16_to_float(x)); });
      }
      break;
    case DType::kHalf:
      if (f.rounding == DType::kBFloat16) {
        read(uint16_t(), [](uint16_t x) { return static_cast<Real>(bfloat16_to_float(float_to_bfloat16(half_to_float(x)))); });
      } else {
        read(uint16_t(), [](uint16_t x) { return static_cast<Real>(half_to_float(x)); });
      }
      break;
    case DType::kDouble:
      read(double(), exactly);
      break;
  }
  for (int64_t i = length; i < whole; ++i) out[i] = Real(0);
}

template <class Real>
constexpr DType kComputed = std::is_same_v<Real, float> ? DType::kFloat : DType::kDouble;

// A tile's features from channel c0 on where they lie, in the order of the map, as the loops compute with them; null where they are
// another dtype's, rounded first, of several images or partly taken for 0: read_channels' and read_pixels' work.
template <class Real>
const Real* find_features(const FeatureMap<Real>& f, const PixelTile& t, int64_t c0) {
  const bool rounds = f.rounding == DType::kBFloat16 || f.rounding == DType::kHalf;
  if (f.dtype != kComputed<Real> || rounds || f.unreached || t.images > 1) return nullptr;
  const int64_t place = f.channels_last ? t.p0 * f.stride + c0 : t.p0 + c0 * f.stride;
  return static_cast<const Real*>(f.data) + t.image * f.batch_stride + place;
}

// A tile's pixels of channels [c0, c0 + count), pixels side by side, with zeros up to `whole` pixels.
template <class Part, class Real = typename Part::Real>
void read_channels(const FeatureMap<Real>& f, const PixelTile& t, int64_t c0, int64_t count, int64_t whole, Real* out, int64_t pitch) {
  const uint8_t* unreached = f.unreached ? f.unreached + t.image * f.pixels + t.p0 : nullptr;
  const int64_t last = t.images - 1, total = t.total();
  for (int64_t c = 0; c < count; ++c) {
    Real* row = out + c * pitch;
    for (int64_t i = 0; i < t.images; ++i) {
      const int64_t offset = (t.image + i) * f.batch_stride + (c0 + c) * f.stride + t.p0;
      read_features(f, offset, t.n, i == last ? whole - last * t.n : t.n, f.pilot + c0 + c, false, row + i * t.n);
    }
    for (int64_t x = 0; unreached && x < total; ++x) row[x] = unreached[x] ? Real(0) : row[x];
  }
}

// The same, channels side by side, with zeros up to `whole` channels.
template <class Part, class Real = typename Part::Real>
void read_pixels(const FeatureMap<Real>& f, const PixelTile& t, int64_t c0, int64_t count, int64_t whole, Real* out, int64_t pitch) {
  const uint8_t* unreached = f.unreached ? f.unreached + t.image * f.pixels + t.p0 : nullptr;
  for (int64_t i = 0, x = 0; i < t.images; ++i) {
    for (int64_t p = t.p0; p < t.p0 + t.n; ++p, ++x) {
      if (unreached && unreached[x]) {
        std::fill_n(out + x * pitch, whole, Real(0));
      } else {
        const int64_t offset = (t.image + i) * f.batch_stride + p * f.stride + c0;
        read_features(f, offset, count, whole, f.pilot + c0, true, out + x * pitch);
      }
    }
  }
}

// Where the features' gradient, dense and in their order, of a tile's channels from c0 on can be streamed to; null: write_row's work.
template <class Part, class Real = typename Part::Real>
Real* find_gradient(void* gradient, const FeatureMap<Real>& f, const PixelTile& t, int64_t c0) {
  const int64_t row = f.channels_last ? f.channels : f.pixels, run = f.channels_last ? f.channels : t.n;
  if (f.dtype != kComputed<Real> || t.images > 1 || row % Part::kLanes || run % Part::kLanes) return nullptr;
  const int64_t place = f.channels_last ? t.p0 * f.channels + c0 : t.p0 + c0 * f.pixels;
  Real* out = static_cast<Real*>(gradient) + t.image * f.channels * f.pixels + place;
  return reinterpret_cast<uintptr_t>(out) % sizeof(Part) ? nullptr : out;
}

// Whole vectors past the caches where they begin at one: nobody reads them soon, and they need not be fetched first.
template <class Part, class Real = typename Part::Real>
void write_through(const Real* row, int64_t n, Real* out) {
  if (reinterpret_cast<uintptr_t>(out) % sizeof(Part)) {
    std::copy_n(row, n, out);
    return;
  }
  int64_t i = 0;
  for (; i + Part::kLanes <= n; i += Part::kLanes) Part::load(row + i).stream(out + i);
  for (; i < n; ++i) out[i] = row[i];
}

// n numbers to element `offset` of an array of a dtype.
template <class Part>
void write_row(const typename Part::Real* row, int64_t n, DType dtype, void* data, int64_t offset) {
  using Real = typename Part::Real;
  switch (dtype) {
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(data)[offset + i] = float_to_bfloat16(static_cast<float>(row[i]));
      break;
    case DType::kHalf:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(data)[offset + i] = float_to_half(static_cast<float>(row[i]));
      break;
    case DType::kFloat:
      if constexpr (std::is_same_v<Real, float>) {
        write_through<Part>(row, n, static_cast<float*>(data) + offset);
      } else {
        for (int64_t i = 0; i < n; ++i) static_cast<float*>(data)[offset + i] = static_cast<float>(row[i]);
      }
      break;
    case DType::kDouble:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(data)[offset + i] = row[i];
      break;
  }
}

}  // namespace hetero::cpu
