// Rows of labels of any type and stride, converted for the pixel loop. Everything here is `static`: each instruction set
// compiles its own.
#pragma once

#include <cstdint>

#include "problem.h"

namespace hetero::cpu {

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
