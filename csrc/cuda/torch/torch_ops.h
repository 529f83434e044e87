// What the registrations of the CUDA kernels share: torch tensors as the launchers' plain pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../../torch_ops.h"
#include "../pixel_losses/pixel_losses.h"

namespace hetero::cuda {

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

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) { return torch::stable::new_empty(like, size, ScalarType::Float); }

inline float* pointer(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Logits describe(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected [B, K, h, w]");
  Logits out{x.const_data_ptr(), float_type(x, name), {}, x.size(2), x.size(3), nullptr};
  for (int i = 0; i < 4; ++i) out.stride[i] = x.stride(i);
  return out;
}

// The device and stream of a call, and the tensors that live as long as it does.
class Surroundings {
 public:
  explicit Surroundings(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    runtime = {[this](int64_t bytes) { return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)).mutable_data_ptr(); },
               stream, card_of(like.get_device_index()), like.get_device_index()};
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
    a.label_type = label_type(labels, a.batch);
    a.labels = labels.const_data_ptr();
    for (int i = 0; i < 3; ++i) a.label_stride[i] = labels.stride(i);
    a.label_height = labels.size(1);
    a.label_width = labels.size(2);
    a.label_resolution = label_resolution;
    a.align_corners = align_corners;
    a.ignore_index = ignore_index;
    a.reduction = reduction_of(reduction);
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
