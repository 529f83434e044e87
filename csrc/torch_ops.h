// What the registrations of both libraries share: arguments of the operators, checked, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "pixel/hakd.h"

namespace hetero {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Every operator's last argument: which package a compiled graph was traced by (hetero_kernels/ops/library.py). No kernel
// looks at it.
using Sources = std::string;

inline std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> out(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) out[i] = x.size(i);
  return out;
}

// The temperature and `count - 1` other numbers, on the CPU, where reading them waits for nothing.
inline std::vector<double> scalars(const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Double && packed.numel() == count && packed.is_cpu(),
                  "scalars must be float64 [", count, "] on the CPU");
  const Tensor dense = torch::stable::contiguous(packed);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  STD_TORCH_CHECK(values[0] >= 1e-6 && values[0] <= 1e6, "temperature is ", values[0], ", expected a number in [1e-6, 1e6]");
  return {values, values + count};
}

inline LabelType label_type(const Tensor& labels, int64_t batch) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.size(0) == batch, "labels has the wrong shape, expected [B, H, W]");
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      return LabelType::kInt64;
    case ScalarType::Int:
      return LabelType::kInt32;
    case ScalarType::Byte:
      return LabelType::kUInt8;
    default:
      STD_TORCH_CHECK(false, "labels has an unsupported dtype, expected int64, int32 or uint8");
  }
}

inline Reduction reduction_of(const std::string& reduction) {
  if (reduction == "mean") return Reduction::kMean;
  if (reduction == "sum") return Reduction::kSum;
  STD_TORCH_CHECK(reduction == "none", "reduction is '", reduction, "', expected 'mean', 'sum' or 'none'");
  return Reduction::kNone;
}

inline Kem kem_of(const std::string& kem) {
  if (kem == "none") return Kem::kNone;
  if (kem == "class") return Kem::kClass;
  STD_TORCH_CHECK(kem == "spatial", "kem is '", kem, "', expected 'class', 'spatial' or 'none'");
  return Kem::kSpatial;
}

// What a projection's features and weight are rounded to first, as a library's DType; kFloat: nothing.
template <class DType>
DType rounding_of(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kHalf;
  STD_TORCH_CHECK(name == "none", "rounding is '", name, "', expected 'none', 'bfloat16' or 'float16'");
  return DType::kFloat;
}

template <class DType>
Tensor rounded(const Tensor& x, DType rounding) {
  if (rounding == DType::kFloat) return x;
  return torch::stable::to(x, rounding == DType::kHalf ? ScalarType::Half : ScalarType::BFloat16);
}

// Of features [B, C, h, w]: from pixel to pixel of a row, and whether a row's last one is as far from the next row's first.
inline int64_t pixel_stride(const Tensor& x) { return x.size(3) > 1 ? x.stride(3) : x.stride(2); }
inline bool rows_joined(const Tensor& x) {
  return x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.stride(3) * x.size(3);
}

// Whether features are read with neighbouring channels side by side: hetero_kernels/layout.py has the same. Of one pixel these
// are the rows worth reading.
inline bool reads_channels_last(const Tensor& x) {
  const bool adjacent = x.size(1) == 1 || x.stride(1) == 1;
  return rows_joined(x) && adjacent && (x.size(2) * x.size(3) == 1 || pixel_stride(x) != 1);
}

}  // namespace hetero
