// The logits' gradient through a projection's weights: the features' gradient, written once.
#pragma once

#include "features.cuh"

namespace hetero::cuda {

struct BackProblem {
  BackArguments a;
  int64_t tiles_of_image, tiles;
};

// A block takes tiles of pixels, one after the other; a warp has every eighth 16 channels of them.
HK_KERNEL void __launch_bounds__(kFeatureThreads, 2) project_back_kernel(const __grid_constant__ BackProblem p) {
  constexpr int kTiles = kBackPixels / 8;
  const BackArguments& a = p.a;
  const int classes = static_cast<int>(a.classes), pitch = back_pitch(kBackPixels), rows = 8 * class_tiles_of(classes);
  SharedAllocator memory(dynamic_shared_memory());
  const Shared<float> gradient = memory.take<float>(rows * pitch);
  const LaneOfFragment at;
  const bool exact = a.weight.dtype != DType::kFloat;
  const float factor = a.factor ? read(a.factor) : 1.f;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t image = tile / p.tiles_of_image, first = (tile - image * p.tiles_of_image) * kBackPixels;
    const int count = static_cast<int>(a.pixels - first < kBackPixels ? a.pixels - first : kBackPixels);
    if (tile != blockIdx.x) __syncthreads();
    const float* from = a.logit_gradient + image * a.classes * a.pixels + first;
    for (int i = threadIdx.x; i < rows * kBackPixels; i += kFeatureThreads) {
      const int k = i / kBackPixels, pixel = i % kBackPixels;
      gradient.set(k * pitch + pixel, k < classes && pixel < count ? read(from + k * a.pixels + pixel) : 0.f);
    }
    __syncthreads();
    for (int64_t channel = threadIdx.x / kWarp * kSliceChannels; channel < a.channels; channel += kWarps * kSliceChannels) {
      FragmentC sums[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) sums[n] = {{0.f, 0.f, 0.f, 0.f}};
      for (int k = 0; k < classes; k += 8) {
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t c = channel + at.row(j);
          const int row = k + at.inner(j);
          const bool inside = c < a.channels && row < classes;
          w[j] = inside ? read_float(a.weight.data, a.weight.dtype, row * a.weight.stride[0] + c * a.weight.stride[1]) : 0.f;
        }
        const SplitA left = SplitA::make(w);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int from_row = (k + at.t) * pitch + 8 * n + at.g;
          add_product(sums[n], left, SplitB::make(gradient[from_row], gradient[from_row + 4 * pitch]), exact, false);
        }
      }
      const int64_t out = image * a.channels * a.pixels;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t c = channel + at.sum_row(i);
          const int pixel = 8 * n + at.sum_column(i);
          if (c >= a.channels || pixel >= count) continue;
          write_float(a.out, a.dtype, out + c * a.channel_stride + (first + pixel) * a.pixel_stride, sums[n].x[i] * factor);
        }
      }
    }
  }
}

}  // namespace hetero::cuda
