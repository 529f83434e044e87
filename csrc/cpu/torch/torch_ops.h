// What the registrations of the CPU kernels share: torch tensors as the loops' plain pointers.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../../torch_ops.h"
#include "../core/subnormals.h"
#include "../pixel_losses/pixel_losses.h"

namespace hetero::cpu {

inline DType float_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, name, " has an unsupported dtype, expected float32, bfloat16, float16 or float64");
  }
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

template <class Real>
Tensor empty_like_compute(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size, std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float);
}

template <class Real>
constexpr ScalarType kCompute = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

template <class Real>
Tensor dense(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, kCompute<Real>));
}

template <class Real>
Tensor empty_gradient(const Tensor& logits, bool wanted) {
  return empty_like_compute<Real>(logits, wanted ? sizes(logits) : std::vector<int64_t>{0});
}

template <class Real>
Logits<Real> describe(const Tensor& x, const char* name, const Tensor& gradient, bool wanted) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected [B, K, h, w]");
  Logits<Real> out{x.const_data_ptr(), float_type(x, name), {}, x.size(2), x.size(3), nullptr};
  for (int i = 0; i < 4; ++i) out.stride[i] = x.stride(i);
  if (wanted) out.gradient = static_cast<Real*>(gradient.mutable_data_ptr());
  return out;
}

inline Labels describe(const Tensor& labels, int64_t batch) {
  const LabelType type = label_type(labels, batch);
  Labels out{labels.const_data_ptr(), type, {}, labels.size(1), labels.size(2)};
  for (int i = 0; i < 3; ++i) out.stride[i] = labels.stride(i);
  return out;
}

// A 0-dim divisor in whatever dtype, as a double.
inline std::optional<double> scalar(const std::optional<Tensor>& x) {
  if (!x) return std::nullopt;
  const Tensor wide = torch::stable::to(*x, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

// torch's threads and torch's allocator: what profilers see is what is used.
class TorchRuntime {
 public:
  explicit TorchRuntime(const Tensor& like) : like_(like) {
    runtime.parallel = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flushed;
        body(begin, end);
      });
    };
    runtime.allocate = [this](int64_t bytes) {
      workspace_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
      return workspace_.back().mutable_data_ptr();
    };
  }
  Runtime runtime;

 private:
  const Tensor& like_;
  std::vector<Tensor> workspace_;
};

// The outputs and arguments that both losses share.
template <class Real>
struct Bound {
  LossArguments<Real> arguments{};
  Tensor loss, terms[2];
  std::optional<Logits<Real>> teacher;
  std::optional<Tensor> upstream;
  std::optional<double> normalizer[2];

  Bound(const Tensor& labels, const Logits<Real>& student, const std::optional<Logits<Real>>& teacher_logits,
        const Tensor& like, bool label_resolution, bool align_corners, int64_t ignore_index,
        const std::string& reduction, const std::optional<Tensor>& normalizer0, const std::optional<Tensor>& normalizer1,
        const std::optional<Tensor>& pixel_upstream)
      : teacher(teacher_logits), upstream(pixel_upstream) {
    LossArguments<Real>& a = arguments;
    a.batch = like.size(0);
    a.classes = like.size(1);
    a.student = student;
    a.teacher = teacher ? &*teacher : nullptr;
    a.labels = describe(labels, a.batch);
    a.label_resolution = label_resolution;
    a.align_corners = align_corners;
    a.ignore_index = ignore_index;
    a.reduction = reduction_of(reduction);
    std::vector<int64_t> shape;
    if (a.reduction == Reduction::kNone) {
      shape = {a.batch, label_resolution ? a.labels.height : student.height, label_resolution ? a.labels.width : student.width};
    }
    for (Tensor* out : {&loss, &terms[0], &terms[1]}) *out = empty_like_compute<Real>(like, shape);
    a.loss = static_cast<Real*>(loss.mutable_data_ptr());
    for (int i = 0; i < 2; ++i) a.term[i] = static_cast<Real*>(terms[i].mutable_data_ptr());
    normalizer[0] = scalar(normalizer0);
    normalizer[1] = scalar(normalizer1);
    for (int i = 0; i < 2; ++i) a.normalizer[i] = normalizer[i] ? &*normalizer[i] : nullptr;
    if (upstream) {
      const auto compute = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
      if (upstream->scalar_type() != compute) upstream = torch::stable::to(*upstream, compute);
      STD_TORCH_CHECK(upstream->dim() == 3, "upstream must be [B, loss grid]");
      a.upstream = static_cast<const Real*>(upstream->const_data_ptr());
      for (int i = 0; i < 3; ++i) a.upstream_stride[i] = upstream->stride(i);
    }
  }
  Bound(const Bound&) = delete;  // arguments point into this object
  Bound& operator=(const Bound&) = delete;
};

}  // namespace hetero::cpu
