// Features and weights as the projection's launchers take them.
#pragma once

#include "../projection/projection.h"
#include "torch_ops.h"

namespace hetero::cuda {

inline Matrix matrix(const Tensor& x, const char* name) {
  return {x.const_data_ptr(), float_type(x, name), {x.stride(0), x.dim() > 1 ? x.stride(1) : 0}};
}

// [B, C, h, w] and [K, C], in any order.
inline FeatureArguments features_of(const Tensor& x, const Tensor& weight, const char* name) {
  FeatureArguments out{};
  out.data = x.const_data_ptr();
  out.dtype = float_type(x, name);
  for (int i = 0; i < 4; ++i) out.stride[i] = x.stride(i);
  out.channels = x.size(1);
  out.weight = matrix(weight, name);
  return out;
}

// For the gradient of features [B, C, h, w], of their dtype and without gaps.
struct FeaturesGradient {
  Tensor tensor;
  int64_t channel_stride, pixel_stride;

  FeaturesGradient(const Tensor& like, bool channels_last) : tensor(like) {
    const int64_t b = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
    tensor = torch::stable::new_empty(like, channels_last ? std::vector<int64_t>{b, h, w, c} : std::vector<int64_t>{b, c, h, w});
    if (channels_last) tensor = torch::stable::transpose(torch::stable::transpose(tensor, 1, 3), 2, 3);
    channel_stride = channels_last ? 1 : h * w;
    pixel_stride = channels_last ? c : 1;
  }
};

}  // namespace hetero::cuda
