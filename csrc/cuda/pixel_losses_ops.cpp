// Registers the CUDA kernels of hetero_kernels::hakd_loss and ::segmentation_loss (schemas: hetero_kernels/ops/) through
// torch's stable ABI: unpacks tensors, allocates outputs, nothing else. The CUDA kernels are a library of their own, so
// that the CPU's load beside a torch without CUDA.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "pixel_losses.h"

namespace hetero::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType float_type(const Tensor& x, const char* name) {
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

std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> out(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) out[i] = x.size(i);
  return out;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& size) { return torch::stable::new_empty(like, size, ScalarType::Float); }

float* pointer(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Logits describe(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected [B, K, h, w]");
  Logits out{x.const_data_ptr(), float_type(x, name), {}, x.size(2), x.size(3), nullptr};
  for (int i = 0; i < 4; ++i) out.stride[i] = x.stride(i);
  return out;
}

// Numbers on the CPU, where reading them waits for nothing.
std::vector<double> scalars(const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Double && packed.numel() == count && packed.is_cpu(),
                  "scalars must be float64 [", count, "] on the CPU");
  const Tensor dense = torch::stable::contiguous(packed);
  const double* values = static_cast<const double*>(dense.const_data_ptr());
  STD_TORCH_CHECK(values[0] >= 1e-6 && values[0] <= 1e6, "temperature is ", values[0], ", expected a number in [1e-6, 1e6]");
  return {values, values + count};
}

// Arguments that both losses share, and the tensors that they point into.
class Bound {
 public:
  Bound(const Tensor& student, const std::optional<Tensor>& teacher, const char* names[2], const Tensor& labels,
        const std::optional<Tensor>& first_normalizer, const std::optional<Tensor>& second_normalizer,
        const std::optional<Tensor>& upstream, bool label_resolution, bool align_corners, int64_t ignore_index,
        const std::string& reduction)
      : guard_(student.get_device_index()), like_(student) {
    Arguments& a = arguments;
    a.student = describe(student, names[0]);
    a.batch = student.size(0);
    a.classes = student.size(1);
    a.has_teacher = teacher.has_value();
    if (teacher) {
      a.teacher = describe(*teacher, names[1]);
      STD_TORCH_CHECK(teacher->size(0) == a.batch && teacher->size(1) == a.classes, names[1], " must have the B and K of ", names[0]);
    }
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
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(student.get_device_index(), &stream));
    runtime = {[this](int64_t bytes) { return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)).mutable_data_ptr(); },
               stream, card_of(student.get_device_index())};
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

  // Torch's allocator hands memory out again only to later work on the same stream: it may go when the call returns.
  Tensor& keep(Tensor x) {
    kept_.push_back(std::make_unique<Tensor>(std::move(x)));
    return *kept_.back();
  }

  Arguments arguments{};
  Runtime runtime;
  Tensor loss, terms[2];

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& like_;
  std::vector<std::unique_ptr<Tensor>> kept_;
};

// The gradient of `logits`, and where kernels write it; zeros where no kernel will.
Tensor gradient_of(const Tensor& logits, bool wanted, bool zero, Logits& described) {
  Tensor gradient = empty(logits, wanted ? sizes(logits) : std::vector<int64_t>{0});
  if (wanted && zero) torch::stable::zero_(gradient);
  if (wanted && !zero) described.gradient = pointer(gradient);
  return gradient;
}

using HakdOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SegmentationOutput = std::tuple<Tensor, Tensor, Tensor, Tensor>;

HakdOutput hakd_loss_cuda(Tensor student, Tensor teacher, Tensor labels, Tensor packed, std::optional<Tensor> hakd_normalizer,
                          std::optional<Tensor> proj_normalizer, std::optional<Tensor> upstream, bool kmm, std::string kem,
                          std::string divergence, std::string resolution, bool align_corners, int64_t ignore_index,
                          std::string reduction, bool student_grad, bool teacher_grad) {
  const std::vector<double> values = scalars(packed, 3);
  STD_TORCH_CHECK(kem == "none" || kem == "class" || kem == "spatial", "kem is '", kem, "', expected 'class', 'spatial' or 'none'");
  const char* names[2] = {"student_logits", "teacher_logits"};
  Bound bound(student, teacher, names, labels, hakd_normalizer, proj_normalizer, upstream, resolution == "label", align_corners,
              ignore_index, reduction);
  Arguments& a = bound.arguments;
  a.temperature = values[0];
  for (int i = 0; i < 2; ++i) a.weight[i] = values[1 + i];
  Tensor student_gradient = gradient_of(student, student_grad, false, a.student);
  Tensor teacher_gradient = gradient_of(teacher, teacher_grad, values[2] == 0, a.teacher);
  hakd_loss(a, kmm, kem == "none" ? 0 : kem == "class" ? 1 : 2, divergence == "ce", bound.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student_gradient, teacher_gradient};
}

SegmentationOutput segmentation_loss_cuda(Tensor logits, std::optional<Tensor> teacher, Tensor labels,
                                          std::optional<Tensor> class_weight, Tensor packed,
                                          std::optional<Tensor> task_normalizer, std::optional<Tensor> kd_normalizer,
                                          std::optional<Tensor> upstream, bool align_corners, int64_t ignore_index,
                                          std::string reduction, bool grad) {
  const std::vector<double> values = scalars(packed, 4);
  const char* names[2] = {"logits", "teacher_logits"};
  Bound bound(logits, teacher, names, labels, task_normalizer, kd_normalizer, upstream, true, align_corners, ignore_index, reduction);
  Arguments& a = bound.arguments;
  a.temperature = values[0];
  for (int i = 0; i < 2; ++i) a.weight[i] = values[1 + i];
  Tensor gradient = gradient_of(logits, grad, false, a.student);
  const float* weight = nullptr;
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->numel() == a.classes, "class_weight must be [K]");
    weight = static_cast<const float*>(
        bound.keep(torch::stable::contiguous(torch::stable::to(*class_weight, ScalarType::Float))).const_data_ptr());
  }
  segmentation_loss(a, weight, values[3], bound.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CUDA, library) {
  library.impl("hakd_loss", TORCH_BOX(&hakd_loss_cuda));
  library.impl("segmentation_loss", TORCH_BOX(&segmentation_loss_cuda));
}

}  // namespace hetero::cuda
