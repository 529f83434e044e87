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

template <class Real, class Stored, class Convert>
static inline void convert_row(const void* row, int64_t stride, int n, Real* out, Convert convert) {
  const Stored* in = static_cast<const Stored*>(row);
  if (stride == 1) {
    for (int i = 0; i < n; ++i) out[i] = convert(in[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = convert(in[i * stride]);
  }
}

static inline int element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// n logits from element `offset` on, `stride` elements apart.
template <class Real>
static inline void load_logits(const void* logits, DType dtype, int64_t offset, int64_t stride, int n, Real* out) {
  const void* row = static_cast<const char*>(logits) + offset * element_size(dtype);
  switch (dtype) {
    case DType::kFloat:
      convert_row<Real, float>(row, stride, n, out, [](float x) { return static_cast<Real>(x); });
      break;
    case DType::kBFloat16:
      convert_row<Real, uint16_t>(row, stride, n, out, [](uint16_t x) { return Real(bfloat16_to_float(x)); });
      break;
    case DType::kHalf:
      convert_row<Real, uint16_t>(row, stride, n, out, [](uint16_t x) { return Real(half_to_float(x)); });
      break;
    case DType::kDouble:
      convert_row<Real, double>(row, stride, n, out, [](double x) { return static_cast<Real>(x); });
      break;
  }
}

template <class Stored>
static inline int convert_labels(const void* labels, int64_t offset, int64_t stride, const int32_t* columns, int n,
                                 int64_t ignore_index, int32_t* out) {
  const Stored* in = static_cast<const Stored*>(labels) + offset;
  int valid = 0;
  for (int i = 0; i < n; ++i) {
    const int64_t label = static_cast<int64_t>(in[columns[i] * stride]);
    const bool counts = label != ignore_index;
    out[i] = counts ? static_cast<int32_t>(label) : -1;
    valid += counts;
  }
  return valid;
}

// Labels of the loss grid's pixels (image, row, x0 .. x0 + n), -1 where ignored; returns how many count.
template <class Real>
static inline int load_labels(const PixelProblem<Real>& p, int64_t image, int64_t row, int64_t x0, int n, int32_t* out) {
  const int64_t offset = image * p.label_stride[0] + static_cast<int64_t>(p.label_row[row]) * p.label_stride[1];
  const int32_t* columns = p.label_column + x0;
  switch (p.label_type) {
    case LabelType::kInt64:
      return convert_labels<int64_t>(p.labels, offset, p.label_stride[2], columns, n, p.ignore_index, out);
    case LabelType::kInt32:
      return convert_labels<int32_t>(p.labels, offset, p.label_stride[2], columns, n, p.ignore_index, out);
    default:
      return convert_labels<uint8_t>(p.labels, offset, p.label_stride[2], columns, n, p.ignore_index, out);
  }
}

}  // namespace hetero::cpu
