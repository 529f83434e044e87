// Registers the CUDA kernels of hetero_kernels::hakd_loss and ::segmentation_loss (schemas: hetero_kernels/ops/) through
// torch's stable ABI: unpacks tensors, allocates outputs, nothing else. The CUDA kernels are a library of their own, so
// that the CPU's load beside a torch without CUDA.

#include "torch_ops.h"

namespace hetero::cuda {

namespace {

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
                          std::string reduction, bool student_grad, bool teacher_grad, Sources) {
  const std::vector<double> values = scalars(packed, 3);
  const int weighing = static_cast<int>(kem_of(kem));
  Bound bound(student, describe(student, "student_logits"), labels, hakd_normalizer, proj_normalizer, upstream, resolution == "label", align_corners,
              ignore_index, reduction);
  bound.set_teacher(teacher, "teacher_logits", "student_logits");
  Arguments& a = bound.arguments;
  a.temperature = values[0];
  for (int i = 0; i < 2; ++i) a.weight[i] = values[1 + i];
  Tensor student_gradient = gradient_of(student, student_grad, false, a.student);
  Tensor teacher_gradient = gradient_of(teacher, teacher_grad, values[2] == 0, a.teacher);
  hakd_loss(a, kmm, weighing, divergence == "ce", bound.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student_gradient, teacher_gradient};
}

SegmentationOutput segmentation_loss_cuda(Tensor logits, std::optional<Tensor> teacher, Tensor labels,
                                          std::optional<Tensor> class_weight, Tensor packed,
                                          std::optional<Tensor> task_normalizer, std::optional<Tensor> kd_normalizer,
                                          std::optional<Tensor> upstream, bool align_corners, int64_t ignore_index,
                                          std::string reduction, bool grad, Sources) {
  const std::vector<double> values = scalars(packed, 4);
  Bound bound(logits, describe(logits, "logits"), labels, task_normalizer, kd_normalizer, upstream, true, align_corners, ignore_index,
              reduction);
  if (teacher) bound.set_teacher(*teacher, "teacher_logits", "logits");
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
