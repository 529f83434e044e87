// Registers the CPU kernels of hetero_kernels::projected_hakd_loss and ::project_back (schemas: hetero_kernels/ops/) through
// torch's stable ABI: unpacks tensors, allocates outputs, nothing else.

#include "../projected_losses/projected_losses.h"
#include "torch_ops.h"

namespace hetero::cpu {

namespace {

// A network's side of the call: tensors that live as long as it does, and the loop's view of them.
template <class Real>
struct Side {
  Tensor features, weight, logit_gradient, weight_gradient, bias_gradient;
  std::optional<Tensor> bias;
  Features<Real> view{};

  Side(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, const char* name, bool features_grad,
       bool weight_grad)
      : features(x), weight(dense<Real>(w)) {
    STD_TORCH_CHECK(x.dim() == 4 && w.dim() == 2 && w.size(1) == x.size(1), name,
                    "_features must be [B, C, h, w] and its weight [K, C]");
    const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3), classes = w.size(0);
    if (height > 1 && width > 1 && x.stride(2) != x.stride(3) * width) features = torch::stable::contiguous(x);
    if (b) {
      bias = dense<Real>(*b);
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes, name, "_bias must be [K]");
    }
    const auto output = [&](bool wanted, std::vector<int64_t> size) {
      return empty_like_compute<Real>(x, wanted ? size : std::vector<int64_t>{0});
    };
    logit_gradient = output(features_grad, {batch, classes, height, width});
    weight_gradient = output(weight_grad, {classes, channels});
    bias_gradient = output(weight_grad && b, {classes});
    const auto pointer = [](bool wanted, Tensor& t) { return wanted ? static_cast<Real*>(t.mutable_data_ptr()) : nullptr; };
    view = {features.const_data_ptr(), float_type(x, name), features.stride(0), features.stride(1),
            width > 1 ? features.stride(3) : features.stride(2), channels, float_type(w, name),
            static_cast<const Real*>(weight.const_data_ptr()),
            bias ? static_cast<const Real*>(bias->const_data_ptr()) : nullptr,
            pointer(features_grad, logit_gradient), pointer(weight_grad, weight_gradient),
            pointer(weight_grad && b, bias_gradient)};
    if (height == 1 && width == 1) view.pixel_stride = 1;
  }
  Side(const Side&) = delete;  // the view points into this object
  Side& operator=(const Side&) = delete;
};

using ProjectedOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real>
ProjectedOutput projected(const Tensor& student_features, const Tensor& teacher_features, const Tensor& student_weight,
                          const Tensor& teacher_weight, const std::optional<Tensor>& student_bias,
                          const std::optional<Tensor>& teacher_bias, const Tensor& labels, const Tensor& packed,
                          const std::optional<Tensor>& hakd_normalizer, const std::optional<Tensor>& proj_normalizer,
                          const std::optional<Tensor>& upstream, const HakdChoices& choices, int64_t ignore_index,
                          const std::string& reduction, const bool (&wanted)[4]) {
  const std::vector<double> values = scalars(packed, 3);
  Side<Real> student(student_features, student_weight, student_bias, "student", wanted[0], wanted[1]);
  Side<Real> teacher(teacher_features, teacher_weight, teacher_bias, "teacher", wanted[2], wanted[3]);
  STD_TORCH_CHECK(student_weight.size(0) == teacher_weight.size(0) && student_features.size(0) == teacher_features.size(0) &&
                      student_features.size(2) == teacher_features.size(2) &&
                      student_features.size(3) == teacher_features.size(3),
                  "both networks must have the same classes, batch and grid");
  // The pixels' grid and batch, of which the loss's outputs take their shapes.
  const Logits<Real> grid{nullptr, DType::kFloat, {}, student_features.size(2), student_features.size(3), nullptr};
  Bound<Real> bound(labels, grid, std::nullopt, student_features, false, false, ignore_index, reduction, hakd_normalizer,
                    proj_normalizer, upstream);
  bound.arguments.classes = student_weight.size(0);
  bound.arguments.temperature = values[0];
  bound.arguments.weight[0] = values[1];
  bound.arguments.weight[1] = values[2];
  TorchRuntime torch_runtime(student_features);
  projected_hakd_loss(bound.arguments, student.view, teacher.view, choices, torch_runtime.runtime);
  return {bound.loss, bound.terms[0], bound.terms[1], student.logit_gradient, teacher.logit_gradient,
          student.weight_gradient, teacher.weight_gradient, student.bias_gradient, teacher.bias_gradient};
}

ProjectedOutput projected_hakd_loss_cpu(Tensor student_features, Tensor teacher_features, Tensor student_weight,
                                        Tensor teacher_weight, std::optional<Tensor> student_bias,
                                        std::optional<Tensor> teacher_bias, Tensor labels, Tensor packed,
                                        std::optional<Tensor> hakd_normalizer, std::optional<Tensor> proj_normalizer,
                                        std::optional<Tensor> upstream, bool kmm, std::string kem, std::string divergence,
                                        int64_t ignore_index, std::string reduction, bool student_features_grad,
                                        bool student_weight_grad, bool teacher_features_grad, bool teacher_weight_grad,
                                        Sources) {
  const HakdChoices choices{kmm, kem_of(kem), divergence == "ce"};
  STD_TORCH_CHECK(choices.kem != Kem::kSpatial, "kem='spatial' needs all of an image's logits first: project, then hakd_loss");
  bool in_double = false;
  for (const Tensor* t : {&student_features, &teacher_features, &student_weight, &teacher_weight}) in_double |= is_double(*t);
  for (const auto* t : {&student_bias, &teacher_bias}) in_double |= *t && is_double(**t);
  const auto run = in_double ? &projected<double> : &projected<float>;
  return run(student_features, teacher_features, student_weight, teacher_weight, student_bias, teacher_bias, labels, packed,
             hakd_normalizer, proj_normalizer, upstream, choices, ignore_index, reduction,
             {student_features_grad, student_weight_grad, teacher_features_grad, teacher_weight_grad});
}

// [B, C, h, w], dense in the order of `like`.
template <class Real>
Tensor empty_features(const Tensor& like, bool channels_last) {
  const int64_t b = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  if (!channels_last) return empty_like_compute<Real>(like, {b, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(empty_like_compute<Real>(like, {b, h, w, c}), 1, 3), 2, 3);
}

template <class Real>
Tensor back(const Tensor& logit_gradient, const Tensor& weight, const std::optional<Tensor>& factor, const Tensor& like) {
  STD_TORCH_CHECK(logit_gradient.dim() == 4 && like.dim() == 4 && weight.dim() == 2 && logit_gradient.size(0) == like.size(0) &&
                      logit_gradient.size(1) == weight.size(0) && weight.size(1) == like.size(1),
                  "logit_gradient must be [B, K, h, w], weight [K, C] and like [B, C, h, w]");
  const bool channels_last = like.stride(1) == 1 && like.size(1) > 1;
  const int64_t channels = like.size(1), pixels = like.size(2) * like.size(3);
  const Tensor from = dense<Real>(logit_gradient), through = dense<Real>(weight);
  Tensor out = empty_features<Real>(like, channels_last);
  TorchRuntime torch_runtime(like);
  project_back<Real>(static_cast<const Real*>(from.const_data_ptr()), static_cast<const Real*>(through.const_data_ptr()),
                     like.size(0), weight.size(0), channels, pixels, scalar(factor).value_or(1.0), channels_last ? 1 : pixels,
                     channels_last ? channels : 1, static_cast<Real*>(out.mutable_data_ptr()), torch_runtime.runtime);
  return like.scalar_type() == kCompute<Real> ? out : torch::stable::to(out, like.scalar_type());
}

Tensor project_back_cpu(Tensor logit_gradient, Tensor weight, std::optional<Tensor> factor, Tensor like, Sources) {
  return is_double(logit_gradient) ? back<double>(logit_gradient, weight, factor, like)
                                   : back<float>(logit_gradient, weight, factor, like);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CPU, library) {
  library.impl("projected_hakd_loss", TORCH_BOX(&projected_hakd_loss_cpu));
  library.impl("project_back", TORCH_BOX(&project_back_cpu));
}

}  // namespace hetero::cpu
