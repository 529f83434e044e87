// Registers the CPU kernels of hetero_kernels::hakd_loss and ::segmentation_loss (schemas: hetero_kernels/ops/) through
// torch's stable ABI: unpacks tensors, allocates outputs, nothing else.

#include <algorithm>

#include "torch_ops.h"

namespace hetero::cpu {

namespace {

using HakdOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SegmentationOutput = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Scale and shift per class of a network's logits, as the loops take them, and where their gradient goes.
template <class Real>
struct BoundNormalization {
  Tensor scale, shift, gradient;
  Normalization<Real> view;

  BoundNormalization(const Tensor& like, const Tensor& given_scale, const Tensor& given_shift, bool relu, bool wanted)
      : scale(dense<Real>(given_scale)),
        shift(dense<Real>(given_shift)),
        gradient(empty_like_compute<Real>(like, wanted ? std::vector<int64_t>{2, like.size(1)} : std::vector<int64_t>{0})),
        view{static_cast<const Real*>(scale.const_data_ptr()), static_cast<const Real*>(shift.const_data_ptr()), relu} {
    STD_TORCH_CHECK(scale.dim() == 1 && shift.dim() == 1 && scale.size(0) == like.size(1) && shift.size(0) == like.size(1),
                    "scale and shift must be [K]");
    // Of a batch without pixels nothing is written.
    if (wanted) std::fill_n(static_cast<Real*>(gradient.mutable_data_ptr()), gradient.numel(), Real(0));
  }
  BoundNormalization(const BoundNormalization&) = delete;  // the view points into this object
  BoundNormalization& operator=(const BoundNormalization&) = delete;

  void describe(Logits<Real>& logits) {
    logits.normalization = &view;
    if (logits.gradient) logits.normalization_gradient = static_cast<Real*>(gradient.mutable_data_ptr());
  }
};

template <class Real>
HakdOutput hakd(const Tensor& student, const Tensor& teacher, const Tensor& labels, const Tensor& packed,
                const std::optional<Tensor>& hakd_normalizer, const std::optional<Tensor>& proj_normalizer,
                const std::optional<Tensor>& upstream, const HakdChoices& choices, bool label_resolution,
                bool align_corners, int64_t ignore_index, const std::string& reduction, bool student_grad,
                bool teacher_grad, BoundNormalization<Real>* student_normalization = nullptr,
                BoundNormalization<Real>* teacher_normalization = nullptr) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4 && student.size(0) == teacher.size(0) &&
                      student.size(1) == teacher.size(1),
                  "student_logits and teacher_logits must be [B, K, h, w] with the same B and K");
  const std::vector<double> values = scalars(packed, 3);
  Tensor student_gradient = empty_gradient<Real>(student, student_grad);
  Tensor teacher_gradient = empty_gradient<Real>(teacher, teacher_grad);
  Logits<Real> student_logits = describe<Real>(student, "student_logits", student_gradient, student_grad);
  Logits<Real> teacher_logits = describe<Real>(teacher, "teacher_logits", teacher_gradient, teacher_grad);
  if (student_normalization) student_normalization->describe(student_logits);
  if (teacher_normalization) teacher_normalization->describe(teacher_logits);
  Bound<Real> bound(labels, student_logits, teacher_logits, student, label_resolution, align_corners, ignore_index, reduction,
                    hakd_normalizer, proj_normalizer, upstream);
  bound.arguments.temperature = values[0];
  bound.arguments.weight[0] = values[1];
  bound.arguments.weight[1] = values[2];
  TorchRuntime torch_runtime(student);
  hakd_loss(bound.arguments, choices, torch_runtime.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student_gradient, teacher_gradient};
}

HakdOutput hakd_loss_cpu(Tensor student, Tensor teacher, Tensor labels, Tensor packed, std::optional<Tensor> hakd_normalizer,
                         std::optional<Tensor> proj_normalizer, std::optional<Tensor> upstream, bool kmm, std::string kem,
                         std::string divergence, std::string resolution, bool align_corners, int64_t ignore_index,
                         std::string reduction, bool student_grad, bool teacher_grad, Sources) {
  const HakdChoices choices{kmm, kem_of(kem), divergence == "ce"};
  const auto run = [&]<class Real>(Real) {
    return hakd<Real>(student, teacher, labels, packed, hakd_normalizer, proj_normalizer, upstream, choices,
                      resolution == "label", align_corners, ignore_index, reduction, student_grad, teacher_grad);
  };
  return is_double(student) || is_double(teacher) ? run(double()) : run(float());
}

using NormalizedOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NormalizedOutput normalized_hakd_loss_cpu(Tensor student, Tensor student_scale, Tensor student_shift, Tensor teacher,
                                          Tensor teacher_scale, Tensor teacher_shift, Tensor labels, Tensor packed,
                                          std::optional<Tensor> hakd_normalizer, std::optional<Tensor> proj_normalizer,
                                          std::optional<Tensor> upstream, bool student_relu, bool teacher_relu, bool kmm,
                                          std::string kem, std::string divergence, std::string resolution, bool align_corners,
                                          int64_t ignore_index, std::string reduction, bool student_grad, bool teacher_grad,
                                          Sources) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, "student_logits and teacher_logits must be [B, K, h, w]");
  const HakdChoices choices{kmm, kem_of(kem), divergence == "ce"};
  const auto run = [&]<class Real>(Real) -> NormalizedOutput {
    BoundNormalization<Real> student_normalization(student, student_scale, student_shift, student_relu, student_grad);
    BoundNormalization<Real> teacher_normalization(teacher, teacher_scale, teacher_shift, teacher_relu, teacher_grad);
    auto [loss, first, second, student_gradient, teacher_gradient] =
        hakd<Real>(student, teacher, labels, packed, hakd_normalizer, proj_normalizer, upstream, choices, resolution == "label",
                   align_corners, ignore_index, reduction, student_grad, teacher_grad, &student_normalization,
                   &teacher_normalization);
    return {loss, first, second, student_gradient, teacher_gradient, student_normalization.gradient,
            teacher_normalization.gradient};
  };
  return is_double(student) || is_double(teacher) ? run(double()) : run(float());
}

template <class Real>
SegmentationOutput segmentation(const Tensor& logits, const std::optional<Tensor>& teacher, const Tensor& labels,
                                const std::optional<Tensor>& class_weight, const Tensor& packed,
                                const std::optional<Tensor>& task_normalizer, const std::optional<Tensor>& kd_normalizer,
                                const std::optional<Tensor>& upstream, bool align_corners, int64_t ignore_index,
                                const std::string& reduction, bool grad) {
  STD_TORCH_CHECK(logits.dim() == 4, "logits must be [B, K, h, w]");
  const std::vector<double> values = scalars(packed, 4);
  Tensor gradient = empty_gradient<Real>(logits, grad);
  std::optional<Logits<Real>> teacher_logits;
  if (teacher) {
    STD_TORCH_CHECK(teacher->dim() == 4 && teacher->size(0) == logits.size(0) && teacher->size(1) == logits.size(1),
                    "teacher_logits must be [B, K, h, w] with the B and K of logits");
    teacher_logits = describe<Real>(*teacher, "teacher_logits", gradient, false);
  }
  Bound<Real> bound(labels, describe<Real>(logits, "logits", gradient, grad), teacher_logits, logits, true, align_corners,
                    ignore_index, reduction, task_normalizer, kd_normalizer, upstream);
  bound.arguments.temperature = teacher ? values[0] : 1.0;  // nothing else looks at it
  bound.arguments.weight[0] = values[1];
  bound.arguments.weight[1] = values[2];
  std::optional<Tensor> weight;
  if (class_weight) {
    weight = torch::stable::contiguous(
        torch::stable::to(*class_weight, std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float));
    STD_TORCH_CHECK(weight->numel() == logits.size(1), "class_weight must be [K]");
  }
  TorchRuntime torch_runtime(logits);
  segmentation_loss(bound.arguments, weight ? static_cast<const Real*>(weight->const_data_ptr()) : nullptr, values[3],
                    torch_runtime.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], gradient};
}

SegmentationOutput segmentation_loss_cpu(Tensor logits, std::optional<Tensor> teacher, Tensor labels,
                                         std::optional<Tensor> class_weight, Tensor packed,
                                         std::optional<Tensor> task_normalizer, std::optional<Tensor> kd_normalizer,
                                         std::optional<Tensor> upstream, bool align_corners, int64_t ignore_index,
                                         std::string reduction, bool grad, Sources) {
  const bool in_double = is_double(logits) || (teacher && is_double(*teacher));
  const auto run = in_double ? &segmentation<double> : &segmentation<float>;
  return run(logits, teacher, labels, class_weight, packed, task_normalizer, kd_normalizer, upstream, align_corners,
             ignore_index, reduction, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CPU, library) {
  library.impl("hakd_loss", TORCH_BOX(&hakd_loss_cpu));
  library.impl("normalized_hakd_loss", TORCH_BOX(&normalized_hakd_loss_cpu));
  library.impl("segmentation_loss", TORCH_BOX(&segmentation_loss_cpu));
}

}  // namespace hetero::cpu
