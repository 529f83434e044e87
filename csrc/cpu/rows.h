// Rows of logits and labels in any dtype and stride, converted for the pixel loop. Everything here is `static`: each
// instruction set compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "problem.h"

namespace hetero::cpu {

static inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

static inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t wide = magnitude << 13;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  x *= 0x1p112f;  // rebiases the exponent, subnormals included
  uint32_t out;
  std::memcpy(&out, &x, sizeof(out));
  out = magnitude >= 0x7c00u ? (wide | 0x7f800000u) : out;
  out |= static_cast<uint32_t>(bits & 0x8000u) << 16;
  std::memcpy(&x, &out, sizeof(x));
  return x;
}

static inline int element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Bits of |x|, in the order of the magnitudes; infinity and NaN come after every finite number.
static inline int32_t magnitude_bits(float x) { return __builtin_bit_cast(int32_t, x) & 0x7fffffff; }
static inline int64_t magnitude_bits(double x) { return __builtin_bit_cast(int64_t, x) & 0x7fffffffffffffff; }
template <class Real>
using MagnitudeBits = decltype(magnitude_bits(Real()));

template <class Stored, class Real, class Convert>
static inline void convert_row(const void* row, int64_t stride, int n, Real scale, Real* __restrict__ out,
                               MagnitudeBits<Real>& largest, Convert convert) {
  const Stored* in = static_cast<const Stored*>(row);
  MagnitudeBits<Real> most = largest;
  const auto take = [&](int i, Stored stored) {
    const Real x = convert(stored);
    const MagnitudeBits<Real> bits = magnitude_bits(x);
    most = bits > most ? bits : most;
    out[i] = x * scale;
  };
  if (stride == 1) {
    for (int i = 0; i < n; ++i) take(i, in[i]);
  } else {
    for (int i = 0; i < n; ++i) take(i, in[i * stride]);
  }
  largest = most;
}

// n logits from element `offset` on, `stride` elements apart, times `scale`; `largest` takes in their magnitudes.
template <class Real>
static inline void load_logits(const void* logits, DType dtype, int64_t offset, int64_t stride, int n, Real scale, Real* out,
                               MagnitudeBits<Real>& largest) {
  const void* row = static_cast<const char*>(logits) + offset * element_size(dtype);
  switch (dtype) {
    case DType::kFloat:
      convert_row<float>(row, stride, n, scale, out, largest, [](float x) { return static_cast<Real>(x); });
      break;
    case DType::kBFloat16:
      convert_row<uint16_t>(row, stride, n, scale, out, largest, [](uint16_t x) { return Real(bfloat16_to_float(x)); });
      break;
    case DType::kHalf:
      convert_row<uint16_t>(row, stride, n, scale, out, largest, [](uint16_t x) { return Real(half_to_float(x)); });
      break;
    case DType::kDouble:
      convert_row<double>(row, stride, n, scale, out, largest, [](double x) { return static_cast<Real>(x); });
      break;
  }
}

// Labels of the loss grid's pixels (image, row, x0 .. x0 + n) as `use(i, label)`.
template <class Stored, class Real, class Use>
static inline void each_label(const PixelProblem<Real>& p, int64_t image, int64_t row, int64_t x0, int n, Use use) {
  const Stored* in = static_cast<const Stored*>(p.labels) + image * p.label_stride[0] +
                     static_cast<int64_t>(p.label_row[row]) * p.label_stride[1];
  const int64_t stride = p.label_stride[2];
  if (p.label_columns_identity && stride == 1) {
    for (int i = 0; i < n; ++i) use(i, static_cast<int64_t>(in[x0 + i]));
  } else {
    const int32_t* columns = p.label_column + x0;
    for (int i = 0; i < n; ++i) use(i, static_cast<int64_t>(in[columns[i] * stride]));
  }
}

template <class Stored, class Real>
static inline void convert_labels(const PixelProblem<Real>& p, int64_t image, int64_t row, int64_t x0, int n,
                                 int32_t* __restrict__ out) {
  const int64_t ignore_index = p.ignore_index;
  each_label<Stored>(p, image, row, x0, n, [&](int i, int64_t label) {
    out[i] = label != ignore_index ? static_cast<int32_t>(label) : -1;
  });
}

// The labels themselves, -1 where ignored.
template <class Real>
static inline void load_labels(const PixelProblem<Real>& p, int64_t image, int64_t row, int64_t x0, int n, int32_t* out) {
  switch (p.label_type) {
    case LabelType::kInt64:
      return convert_labels<int64_t>(p, image, row, x0, n, out);
    case LabelType::kInt32:
      return convert_labels<int32_t>(p, image, row, x0, n, out);
    default:
      return convert_labels<uint8_t>(p, image, row, x0, n, out);
  }
}

template <class Stored, class Real>
static inline void summarize_row(const PixelProblem<Real>& p, const Real* class_weight, int64_t image, int64_t row,
                                 LabelSummary& out, int32_t* __restrict__ sampled) {
  const int64_t ignore_index = p.ignore_index, classes = p.classes;
  const int n = static_cast<int>(p.width);
  int valid = 0, wrong = 0;
  each_label<Stored>(p, image, row, 0, n, [&](int i, int64_t label) {
    const bool counts = label != ignore_index;
    if (sampled != nullptr) sampled[i] = counts ? static_cast<int32_t>(label) : -1;
    valid += counts;
    wrong += counts && static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes);
  });
  out.valid = valid;
  out.weight = static_cast<double>(valid);
  if (wrong == 0 && class_weight == nullptr) return;
  out.weight = 0;
  each_label<Stored>(p, image, row, 0, n, [&](int i, int64_t label) {
    if (label == ignore_index || out.wrong) return;
    if (label < 0 || label >= classes) {
      out = {valid, 0.0, true, image, p.label_row[row], p.label_column[i], label};
    } else if (class_weight != nullptr) {
      out.weight += class_weight[label];
    }
  });
}

template <class Real>
static void summarize_labels(const PixelProblem<Real>& p, const Real* class_weight, int64_t begin, int64_t end,
                             LabelSummary* rows, int32_t* sampled) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / p.height, row = i % p.height;
    int32_t* const kept = sampled ? sampled + i * p.width : nullptr;
    switch (p.label_type) {
      case LabelType::kInt64:
        summarize_row<int64_t>(p, class_weight, image, row, rows[i], kept);
        break;
      case LabelType::kInt32:
        summarize_row<int32_t>(p, class_weight, image, row, rows[i], kept);
        break;
      case LabelType::kUInt8:
        summarize_row<uint8_t>(p, class_weight, image, row, rows[i], kept);
        break;
    }
  }
}

}  // namespace hetero::cpu
