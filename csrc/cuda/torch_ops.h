// Unpacking of tensors that the registrations of the CUDA kernels share, through torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pixel_losses.h"

namespace hetero::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType float_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, name, " has an unsupported dtype, expected float32, bfloat16 or float16: the CUDA kernels compute in "
                      "float32 (backend='reference' computes in float64 on any device)");
  }
}

inline std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> out(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) out[i] = x.size(i);
  return out;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) { return torch::stable::new_empty(like, size, ScalarType::Float); }

inline float* pointer(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Logits describe(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected [B, K, h, w]");
  Logits out{x.const_data_ptr(), float_type(x, name), {}, x.size(2), x.size(3), nullptr};
  for (int i = 0; i < 4; ++i) out.stride[i] = x.stride(i);
  return out;
}

// Numbers on the CPU, where reading them waits for nothing.
inline std::vector<double> scalars(const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Double && packed.numel() == count && packed.is_cpu(),
                  "scalars must be float64 [", count, "] on the CPU");
  const Tensor dense = torch::stable::contiguous(packed);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  STD_TORCH_CHECK(values[0] >= 1e-6 && values[0] <= 1e6, "temperature is ", values[0], ", expected a number in [1e-6, 1e6]");
  return {values, values + count};
}

// The number that kernels know `kem` by.
inline int kem_of(const std::string& kem) {
  STD_TORCH_CHECK(kem == "none" || kem == "class" || kem == "spatial", "kem is '", kem, "', expected 'class', 'spatial' or 'none'");
  return kem == "none" ? 0 : kem == "class" ? 1 : 2;
}

// The device and stream of a call, and the tensors that live as long as it does.
class Surroundings {
 public:
  explicit Surroundings(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    runtime = {[this](int64_t bytes) { return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)).mutable_data_ptr(); },
               stream, card_of(like.get_device_index())};
  }
  Surroundings(const Surroundings&) = delete;
  Surroundings& operator=(const Surroundings&) = delete;

  // Torch's allocator hands memory out again only to later work on the same stream: it may go when the call returns.
  Tensor& keep(Tensor x) {
    kept_.push_back(std::make_unique<Tensor>(std::move(x)));
    return *kept_.back();
  }

  Runtime runtime;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& like_;
  std::vector<std::unique_ptr<Tensor>> kept_;
};

// Arguments that all losses share; the student's grid is the loss grid unless that is the labels'.
class Bound : public Surroundings {
 public:
  Bound(const Tensor& student, const Logits& student_grid, const Tensor& labels, const std::optional<Tensor>& first_normalizer,
        const std::optional<Tensor>& second_normalizer, const std::optional<Tensor>& upstream, bool label_resolution,
        bool align_corners, int64_t ignore_index, const std::string& reduction)
      : Surroundings(student) {
    Arguments& a = arguments;
    a.student = student_grid;
    a.batch = student.size(0);
    a.classes = student.size(1);
    STD_TORCH_CHECK(labels.dim() == 3 && labels.size(0) == a.batch, "labels has the wrong shape, expected [B, H, W]");
    a.labels = labels.const_data_ptr();
    a.label_type = labels.scalar_type() == ScalarType::Int ? LabelType::kInt32
                   : labels.scalar_type() == ScalarType::Byte ? LabelType::kUInt8 : LabelType::kInt64;
    STD_TORCH_CHECK(a.label_type != LabelType::kInt64 || labels.scalar_type() == ScalarType::Long,
                    "labels has an unsupported dtype, expected int64, int32 or uint8");
    for (int i = 0; i < 3; ++i) a.label_stride[i] = labels.stride(i);
    a.label_height = labels.size(1);
    a.label_width = labels.size(2);
    a.label_resolution = label_resolution;
    a.align_corners = align_corners;
    a.ignore_index = ignore_index;
    a.reduction = reduction == "mean" ? Reduction::kMean : reduction == "sum" ? Reduction::kSum : Reduction::kNone;
    STD_TORCH_CHECK(a.reduction != Reduction::kNone || reduction == "none", "reduction is '", reduction,
                    "', expected 'mean', 'sum' or 'none'");
    const std::optional<Tensor>* given[2] = {&first_normalizer, &second_normalizer};
    for (int i = 0; i < 2; ++i) {
      if (!*given[i]) continue;
      a.normalizer[i] = static_cast<const float*>(keep(torch::stable::to(**given[i], ScalarType::Float)).const_data_ptr());
    }
    if (upstream) {
      const Tensor& factors = keep(torch::stable::to(*upstream, ScalarType::Float));
      STD_TORCH_CHECK(factors.dim() == 3, "upstream must be [B, loss grid]");
      a.upstream = static_cast<const float*>(factors.const_data_ptr());
      for (int i = 0; i < 3; ++i) a.upstream_stride[i] = factors.stride(i);
    }
    std::vector<int64_t> shape;
    if (a.reduction == Reduction::kNone) {
      shape = {a.batch, label_resolution ? a.label_height : a.student.height, label_resolution ? a.label_width : a.student.width};
    }
    for (Tensor* out : {&loss, &terms[0], &terms[1]}) *out = empty(student, shape);
    a.loss = pointer(loss);
    for (int i = 0; i < 2; ++i) a.term[i] = pointer(terms[i]);
  }

  // The other network's logits.
  void set_teacher(const Tensor& teacher, const char* name, const char* student_name) {
    arguments.has_teacher = true;
    arguments.teacher = describe(teacher, name);
    STD_TORCH_CHECK(teacher.size(0) == arguments.batch && teacher.size(1) == arguments.classes, name, " must have the B and K of ",
                    student_name);
  }

  Arguments arguments{};
  Tensor loss, terms[2];
};

}  // namespace hetero::cuda
