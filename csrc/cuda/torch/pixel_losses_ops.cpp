// Registers the CUDA kernels of hetero_kernels::hakd_loss, ::normalized_hakd_loss and ::segmentation_loss (schemas: hetero_kernels/ops/) through
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

// Scale and shift of a network's raw logits, and their gradient.
struct Normalization {
  Tensor scale, shift, gradient;

  Normalization(const Tensor& like, const Tensor& given_scale, const Tensor& given_shift, bool wanted)
      : scale(torch::stable::contiguous(torch::stable::to(given_scale, ScalarType::Float))),
        shift(torch::stable::contiguous(torch::stable::to(given_shift, ScalarType::Float))),
        gradient(empty(like, wanted ? std::vector<int64_t>{2, given_scale.size(0)} : std::vector<int64_t>{0})) {
    STD_TORCH_CHECK(like.dim() == 4 && scale.dim() == 1 && shift.dim() == 1 && scale.size(0) == like.size(1) &&
                        shift.size(0) == like.size(1),
                    "logits must be [B, K, h, w], scale and shift [K]");
  }

  void describe(Logits& logits, bool relu) {
    logits.scale = static_cast<const float*>(scale.const_data_ptr());
    logits.shift = static_cast<const float*>(shift.const_data_ptr());
    logits.relu = relu;
    if (gradient.numel() == 0) return;
    if (logits.gradient) {
      logits.normalization_gradient = pointer(gradient);
    } else {
      torch::stable::zero_(gradient);  // no kernel will
    }
  }
};

struct HakdChoices {
  bool kmm;
  std::string kem, divergence, resolution;
  bool align_corners;
  int64_t ignore_index;
  std::string reduction;
  bool student_grad, teacher_grad;
};

// `change` may add to what the kernels are told of the networks.
template <class Change>
HakdOutput hakd(const Tensor& student, const Tensor& teacher, const Tensor& labels, const Tensor& packed,
                const std::optional<Tensor>& hakd_normalizer, const std::optional<Tensor>& proj_normalizer,
                const std::optional<Tensor>& upstream, const HakdChoices& c, Change change) {
  const std::vector<double> values = scalars(packed, 3);
  const int weighing = static_cast<int>(kem_of(c.kem));
  Bound bound(student, describe(student, "student_logits"), labels, hakd_normalizer, proj_normalizer, upstream,
              c.resolution == "label", c.align_corners, c.ignore_index, c.reduction);
  bound.set_teacher(teacher, "teacher_logits", "student_logits");
  Arguments& a = bound.arguments;
  a.temperature = values[0];
  for (int i = 0; i < 2; ++i) a.weight[i] = values[1 + i];
  Tensor student_gradient = gradient_of(student, c.student_grad, false, a.student);
  Tensor teacher_gradient = gradient_of(teacher, c.teacher_grad, values[2] == 0, a.teacher);
  change(a);
  hakd_loss(a, c.kmm, weighing, c.divergence == "ce", bound.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student_gradient, teacher_gradient};
}

HakdOutput hakd_loss_cuda(Tensor student, Tensor teacher, Tensor labels, Tensor packed, std::optional<Tensor> hakd_normalizer,
                          std::optional<Tensor> proj_normalizer, std::optional<Tensor> upstream, bool kmm, std::string kem,
                          std::string divergence, std::string resolution, bool align_corners, int64_t ignore_index,
                          std::string reduction, bool student_grad, bool teacher_grad, Sources) {
  return hakd(student, teacher, labels, packed, hakd_normalizer, proj_normalizer, upstream,
              {kmm, kem, divergence, resolution, align_corners, ignore_index, reduction, student_grad, teacher_grad}, [](Arguments&) {});
}

using NormalizedOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NormalizedOutput normalized_hakd_loss_cuda(Tensor student, Tensor student_scale, Tensor student_shift, Tensor teacher,
                                           Tensor teacher_scale, Tensor teacher_shift, Tensor labels, Tensor packed,
                                           std::optional<Tensor> hakd_normalizer, std::optional<Tensor> proj_normalizer,
                                           std::optional<Tensor> upstream, bool student_relu, bool teacher_relu, bool kmm,
                                           std::string kem, std::string divergence, std::string resolution, bool align_corners,
                                           int64_t ignore_index, std::string reduction, bool student_grad, bool teacher_grad, Sources) {
  Normalization of_student(student, student_scale, student_shift, student_grad);
  Normalization of_teacher(teacher, teacher_scale, teacher_shift, teacher_grad);
  const auto [loss, first, second, student_gradient, teacher_gradient] =
      hakd(student, teacher, labels, packed, hakd_normalizer, proj_normalizer, upstream,
           {kmm, kem, divergence, resolution, align_corners, ignore_index, reduction, student_grad, teacher_grad}, [&](Arguments& a) {
             of_student.describe(a.student, student_relu);
             of_teacher.describe(a.teacher, teacher_relu);
           });
  return {loss, first, second, student_gradient, teacher_gradient, of_student.gradient, of_teacher.gradient};
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
  library.impl("normalized_hakd_loss", TORCH_BOX(&normalized_hakd_loss_cuda));
  library.impl("segmentation_loss", TORCH_BOX(&segmentation_loss_cuda));
}

}  // namespace hetero::cuda
