// Registers the CUDA kernels of hetero_kernels::project and ::project_gradients (schemas: hetero_kernels/ops/projection.py)
// through torch's stable ABI: unpacks tensors, allocates outputs, nothing else.

#include "feature_tensors.h"

namespace hetero::cuda {

namespace {

ProjectionArguments describe(const Tensor& features, const Tensor& factors, DType rounding) {
  STD_TORCH_CHECK(features.dim() == 4 && factors.dim() == 2 && factors.size(1) == features.size(1),
                  "features must be [B, C, h, w] and weight [K, C]");
  return {features.size(0), factors.size(0), features.size(2), features.size(3), features_of(features, factors, "features"), rounding};
}

// As torch::stable::contiguous of a dtype.
const Tensor& dense(Surroundings& call, const Tensor& x, ScalarType dtype) {
  return call.keep(torch::stable::contiguous(torch::stable::to(x, dtype)));
}

using ProjectOutput = std::tuple<Tensor, Tensor, Tensor>;

ProjectOutput project_cuda(Tensor features, Tensor weight, bool statistics, std::string rounding, Sources) {
  Surroundings call(features);
  const DType to = rounding_of<DType>(rounding);
  const Tensor& factors = call.keep(rounded(weight, to));
  const ProjectionArguments a = describe(features, factors, to);
  Tensor logits = empty(features, {a.batch, a.classes, a.height, a.width});
  Tensor pilot = empty(features, {statistics ? a.features.channels : 0});
  Tensor found = torch::stable::new_empty(features, {statistics ? 4 : 0, statistics ? a.classes : 0}, ScalarType::Double);
  if (statistics && logits.numel() == 0) {
    torch::stable::zero_(pilot);
    torch::stable::zero_(found);
  }
  if (logits.numel() > 0) {
    project(a, pointer(logits), statistics ? pointer(pilot) : nullptr,
            statistics ? static_cast<double*>(found.mutable_data_ptr()) : nullptr, call.runtime);
  }
  return {logits, pilot, found};
}

using GradientOutput = std::tuple<Tensor, Tensor>;

GradientOutput project_gradients_cuda(std::optional<Tensor> logit_gradient, std::optional<Tensor> statistics_gradient,
                                      Tensor features, Tensor weight, Tensor logits, Tensor pilot, Tensor statistics,
                                      std::string rounding, bool features_grad, bool weight_grad, Sources) {
  Surroundings call(features);
  const DType to = rounding_of<DType>(rounding);
  const Tensor& factors = call.keep(rounded(weight, to));
  const ProjectionArguments a = describe(features, factors, to);
  const int64_t pixels = a.batch * a.height * a.width;
  LogitGradient gradient{nullptr, nullptr, nullptr, nullptr, pixels > 0 ? 1.0 / static_cast<double>(pixels) : 0.0};
  if (logit_gradient) {
    STD_TORCH_CHECK(logit_gradient->dim() == 4 && logit_gradient->numel() == logits.numel(), "logit_gradient must be as the logits");
    gradient.given = static_cast<const float*>(dense(call, *logit_gradient, ScalarType::Float).const_data_ptr());
  }
  if (statistics_gradient && statistics.numel() > 0) {
    gradient.logits = static_cast<const float*>(dense(call, logits, ScalarType::Float).const_data_ptr());
    gradient.statistics = static_cast<const double*>(dense(call, statistics, ScalarType::Double).const_data_ptr());
    gradient.by_statistics = static_cast<const double*>(dense(call, *statistics_gradient, ScalarType::Double).const_data_ptr());
  }
  const float* centre = pilot.numel() > 0 ? static_cast<const float*>(dense(call, pilot, ScalarType::Float).const_data_ptr()) : nullptr;
  Tensor by_weight = empty(features, weight_grad ? sizes(weight) : std::vector<int64_t>{0});
  if (weight_grad && by_weight.numel() > 0) project_weights(a, gradient, centre, pointer(by_weight), call.runtime);
  Tensor by_features = torch::stable::new_empty(features, {0});
  if (features_grad) {
    FeaturesGradient out(features, reads_channels_last(features));
    project_back({a.batch, a.classes, a.features.channels, a.height * a.width, gradient, a.features.weight, nullptr,
                  out.tensor.mutable_data_ptr(), a.features.dtype, out.channel_stride, out.pixel_stride},
                 call.runtime);
    by_features = out.tensor;
  }
  return {by_features, weight_grad ? torch::stable::to(by_weight, weight.scalar_type()) : by_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CUDA, library) {
  library.impl("project", TORCH_BOX(&project_cuda));
  library.impl("project_gradients", TORCH_BOX(&project_gradients_cuda));
}

}  // namespace hetero::cuda
