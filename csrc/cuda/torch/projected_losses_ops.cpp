// Registers the CUDA kernels of hetero_kernels::projected_hakd_loss and ::project_back (schemas: hetero_kernels/ops/) through
// torch's stable ABI: unpacks tensors, allocates outputs, nothing else.

#include "../projected_losses/projected_losses.h"
#include "feature_tensors.h"

namespace hetero::cuda {

namespace {

// A network's gradients and what the kernels are told of it.
struct Side {
  Tensor logit_gradient, weight_gradient, bias_gradient;
  FeatureArguments view{};

  // `zero`: no kernel writes the gradients.
  Side(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const char* name, bool features_grad,
       bool weight_grad, bool zero) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 2 && weight.size(1) == x.size(1), name,
                    "_features must be [B, C, h, w] and its weight [K, C]");
    view = features_of(x, weight, name);
    const int64_t classes = weight.size(0);
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes, name, "_bias must be [K]");
      view.bias = matrix(*bias, name);
    }
    const auto output = [&](Tensor& gradient, bool wanted, const std::vector<int64_t>& size) -> float* {
      gradient = empty(x, wanted ? size : std::vector<int64_t>{0});
      if (wanted && zero) torch::stable::zero_(gradient);
      return wanted && !zero ? pointer(gradient) : nullptr;
    };
    view.logit_gradient = output(logit_gradient, features_grad, {x.size(0), classes, x.size(2), x.size(3)});
    view.weight_gradient = output(weight_gradient, weight_grad, {classes, x.size(1)});
    view.bias_gradient = output(bias_gradient, weight_grad && bias, {classes});
  }
};

using ProjectedOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ProjectedOutput projected_hakd_loss_cuda(Tensor student_features, Tensor teacher_features, Tensor student_weight,
                                         Tensor teacher_weight, std::optional<Tensor> student_bias,
                                         std::optional<Tensor> teacher_bias, Tensor labels, Tensor packed,
                                         std::optional<Tensor> hakd_normalizer, std::optional<Tensor> proj_normalizer,
                                         std::optional<Tensor> upstream, bool kmm, std::string kem, std::string divergence,
                                         int64_t ignore_index, std::string reduction, bool student_features_grad,
                                         bool student_weight_grad, bool teacher_features_grad, bool teacher_weight_grad,
                                         Sources) {
  const std::vector<double> values = scalars(packed, 3);
  STD_TORCH_CHECK(kem != "spatial", "kem='spatial' needs all of an image's logits first: project, then hakd_loss");
  STD_TORCH_CHECK(student_features.dim() == 4 && teacher_features.dim() == 4 && student_weight.size(0) == teacher_weight.size(0) &&
                      student_features.size(0) == teacher_features.size(0) && student_features.size(2) == teacher_features.size(2) &&
                      student_features.size(3) == teacher_features.size(3),
                  "both networks must have the same classes, batch and grid");
  const Logits grid{nullptr, DType::kFloat, {}, student_features.size(2), student_features.size(3), nullptr};
  Bound bound(student_features, grid, labels, hakd_normalizer, proj_normalizer, upstream, false, false, ignore_index, reduction);
  Side student(student_features, student_weight, student_bias, "student", student_features_grad, student_weight_grad, false);
  Side teacher(teacher_features, teacher_weight, teacher_bias, "teacher", teacher_features_grad, teacher_weight_grad, values[2] == 0);
  Arguments& a = bound.arguments;
  a.classes = student_weight.size(0);
  a.temperature = values[0];
  for (int i = 0; i < 2; ++i) a.weight[i] = values[1 + i];
  projected_hakd_loss(a, student.view, teacher.view, kmm, static_cast<int>(kem_of(kem)), divergence == "ce", bound.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student.logit_gradient, teacher.logit_gradient,
          student.weight_gradient, teacher.weight_gradient, student.bias_gradient, teacher.bias_gradient};
}

Tensor project_back_cuda(Tensor logit_gradient, Tensor weight, std::optional<Tensor> factor, Tensor like, Sources) {
  STD_TORCH_CHECK(logit_gradient.dim() == 4 && like.dim() == 4 && weight.dim() == 2 && logit_gradient.size(0) == like.size(0) &&
                      logit_gradient.size(1) == weight.size(0) && weight.size(1) == like.size(1) &&
                      logit_gradient.size(2) == like.size(2) && logit_gradient.size(3) == like.size(3),
                  "logit_gradient must be [B, K, h, w], weight [K, C] and like [B, C, h, w]");
  const DType dtype = float_type(like, "features");
  Surroundings call(like);
  const Tensor& from = call.keep(torch::stable::contiguous(torch::stable::to(logit_gradient, ScalarType::Float)));
  FeaturesGradient out(like, like.stride(1) == 1 && like.size(1) > 1);
  BackArguments a{like.size(0), weight.size(0), like.size(1), like.size(2) * like.size(3),
                  {static_cast<const float*>(from.const_data_ptr()), nullptr, nullptr, nullptr, 0.0}, matrix(weight, "weight"), nullptr,
                  out.tensor.mutable_data_ptr(), dtype, out.channel_stride, out.pixel_stride};
  if (factor) a.factor = static_cast<const float*>(call.keep(torch::stable::to(*factor, ScalarType::Float)).const_data_ptr());
  project_back(a, call.runtime);
  return out.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CUDA, library) {
  library.impl("projected_hakd_loss", TORCH_BOX(&projected_hakd_loss_cuda));
  library.impl("project_back", TORCH_BOX(&project_back_cuda));
}

}  // namespace hetero::cuda
