// Registers the CPU kernels of hetero_kernels::project and ::project_gradients (schemas: hetero_kernels/ops/projection.py)
// through torch's stable ABI: unpacks tensors, allocates outputs, nothing else.

#include "../projection/projection.h"
#include "torch_ops.h"

namespace hetero::cpu {

namespace {

// A factor as the loops multiply it: rounded, then in the compute dtype.
template <class Real>
Tensor factor(const Tensor& x, DType rounding) {
  return dense<Real>(rounded(x, rounding));
}

// Features [B, C, h, w] whose pixels or whose channels are side by side; anything else is copied.
template <class Real>
struct BoundFeatures {
  Tensor tensor;
  FeatureMap<Real> view{};

  BoundFeatures(const Tensor& x, DType rounding) : tensor(x) {
    STD_TORCH_CHECK(x.dim() == 4, "features has ", x.dim(), " dimensions, expected [B, C, h, w]");
    const bool channels_last = reads_channels_last(x);
    const int64_t pixels = x.size(2) * x.size(3);
    const bool pixels_adjacent = rows_joined(x) && (pixels == 1 || pixel_stride(x) == 1);
    if (!channels_last && !pixels_adjacent) tensor = torch::stable::contiguous(x);
    view = {tensor.const_data_ptr(), float_type(x, "features"), rounding, x.size(0), x.size(1), pixels, tensor.stride(0),
            channels_last ? pixel_stride(tensor) : tensor.stride(1), channels_last, nullptr, nullptr};
  }
  BoundFeatures(const BoundFeatures&) = delete;  // the view points into this object
  BoundFeatures& operator=(const BoundFeatures&) = delete;
};

using ProjectOutput = std::tuple<Tensor, Tensor, Tensor>;

template <class Real>
ProjectOutput project_as(const Tensor& features, const Tensor& weight, bool statistics, DType rounding) {
  STD_TORCH_CHECK(features.dim() == 4 && weight.dim() == 2 && weight.size(1) == features.size(1),
                  "features must be [B, C, h, w] and weight [K, C]");
  const int64_t classes = weight.size(0), channels = features.size(1);
  BoundFeatures<Real> bound(features, rounding);
  const Tensor factors = factor<Real>(weight, rounding);
  Tensor logits = empty_like_compute<Real>(features, {features.size(0), classes, features.size(2), features.size(3)});
  Tensor pilot = empty_like_compute<Real>(features, {statistics ? channels : 0});
  Tensor found = torch::stable::new_empty(features, {statistics ? 4 : 0, statistics ? classes : 0}, ScalarType::Double);
  TorchRuntime torch_runtime(features);
  if (statistics) {
    find_pilot<Real>(bound.view, static_cast<Real*>(pilot.mutable_data_ptr()), torch_runtime.runtime);
    bound.view.pilot = static_cast<const Real*>(pilot.const_data_ptr());
  }
  project<Real>(bound.view, static_cast<const Real*>(factors.const_data_ptr()), classes,
                static_cast<Real*>(logits.mutable_data_ptr()),
                statistics ? static_cast<double*>(found.mutable_data_ptr()) : nullptr, torch_runtime.runtime);
  return {logits, pilot, found};
}

ProjectOutput project_cpu(Tensor features, Tensor weight, bool statistics, std::string rounding, Sources) {
  const auto run = is_double(features) || is_double(weight) ? &project_as<double> : &project_as<float>;
  return run(features, weight, statistics, rounding_of<DType>(rounding));
}

using GradientOutput = std::tuple<Tensor, Tensor>;

// [B, C, h, w] of its own dtype, dense in the order that the loops read.
Tensor empty_features(const Tensor& like, bool channels_last) {
  const int64_t b = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  if (!channels_last) return torch::stable::new_empty(like, {b, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(like, {b, h, w, c}), 1, 3), 2, 3);
}

template <class Real>
GradientOutput gradients_as(const std::optional<Tensor>& logit_gradient, const std::optional<Tensor>& statistics_gradient,
                            const Tensor& features, const Tensor& weight, const Tensor& logits, const Tensor& pilot,
                            const Tensor& statistics, DType rounding, bool features_grad, bool weight_grad) {
  const int64_t classes = weight.size(0);
  BoundFeatures<Real> bound(features, rounding);
  const Tensor factors = factor<Real>(weight, rounding), z = dense<Real>(logits), centre = dense<Real>(pilot);
  if (centre.numel() > 0) bound.view.pilot = static_cast<const Real*>(centre.const_data_ptr());
  LogitsAndGradients<Real> given{};
  given.logits = static_cast<const Real*>(z.const_data_ptr());
  std::optional<Tensor> gradient = logit_gradient;
  if (gradient) {
    STD_TORCH_CHECK(gradient->dim() == 4 && gradient->numel() == logits.numel(), "logit_gradient must be as the logits");
    if (gradient->size(2) > 1 && gradient->size(3) > 1 && gradient->stride(2) != gradient->stride(3) * gradient->size(3)) {
      gradient = torch::stable::contiguous(*gradient);
    }
    given.given = gradient->const_data_ptr();
    given.dtype = float_type(*gradient, "logit_gradient");
    given.stride[0] = gradient->stride(0);
    given.stride[1] = gradient->stride(1);
    given.stride[2] = gradient->size(3) > 1 ? gradient->stride(3) : gradient->stride(2);
  }
  std::optional<Tensor> by_statistics;
  const Tensor measured = dense<double>(statistics);
  if (statistics_gradient && measured.numel() > 0) {
    by_statistics = dense<double>(*statistics_gradient);
    const double* rows = static_cast<const double*>(by_statistics->const_data_ptr());
    given.mean = static_cast<const double*>(measured.const_data_ptr()) + classes;
    given.mean_gradient = rows + classes;
    given.squares_gradient = rows + 2 * classes;
    given.offset_gradient = rows + 3 * classes;
  }
  Tensor by_features = features_grad ? empty_features(features, bound.view.channels_last) : torch::stable::new_empty(features, {0});
  Tensor by_weight = empty_like_compute<Real>(features, weight_grad ? sizes(weight) : std::vector<int64_t>{0});
  TorchRuntime torch_runtime(features);
  project_back<Real>(bound.view, static_cast<const Real*>(factors.const_data_ptr()), classes, given,
                     features_grad ? by_features.mutable_data_ptr() : nullptr,
                     weight_grad ? static_cast<Real*>(by_weight.mutable_data_ptr()) : nullptr, torch_runtime.runtime);
  return {by_features, weight.scalar_type() == kCompute<Real> || !weight_grad ? by_weight
                                                                              : torch::stable::to(by_weight, weight.scalar_type())};
}

GradientOutput project_gradients_cpu(std::optional<Tensor> logit_gradient, std::optional<Tensor> statistics_gradient,
                                     Tensor features, Tensor weight, Tensor logits, Tensor pilot, Tensor statistics,
                                     std::string rounding, bool features_grad, bool weight_grad, Sources) {
  const auto run = is_double(logits) ? &gradients_as<double> : &gradients_as<float>;
  return run(logit_gradient, statistics_gradient, features, weight, logits, pilot, statistics, rounding_of<DType>(rounding),
             features_grad, weight_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CPU, library) {
  library.impl("project", TORCH_BOX(&project_cpu));
  library.impl("project_gradients", TORCH_BOX(&project_gradients_cpu));
}

}  // namespace hetero::cpu
