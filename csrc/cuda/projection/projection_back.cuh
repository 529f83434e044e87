// The logits' gradient through a projection's weights: the features' gradient, written once.
#pragma once

#include "features.cuh"
#include "logit_gradient.cuh"

namespace hetero::cuda {

struct BackProblem {
  BackArguments a;
  int64_t tiles_of_image, tiles;
};

// A block takes tiles of pixels, one after the other; a warp has every eighth 16 channels of them. More classes than there is
// room for come in chunks, which are staged again for every 128 channels.
HK_KERNEL void __launch_bounds__(kFeatureThreads, 2) project_back_kernel(const __grid_constant__ BackProblem p) {
  constexpr int kTiles = kBackPixels / 8;
  const BackArguments& a = p.a;
  const int all = static_cast<int>(a.classes), most = all < kMostFeatureClasses ? all : kMostFeatureClasses;
  const int pitch = back_pitch(kBackPixels), rows = 8 * class_tiles_of(most);
  SharedAllocator memory(dynamic_shared_memory());
  const Shared<float> gradient = memory.take<float>(rows * pitch);
  LogitGradientReader reader(a.gradient, all, a.pixels, rows, memory);
  const LaneOfFragment at;
  const bool exact = a.weight.dtype != DType::kFloat;
  const float factor = a.factor ? read(a.factor) : 1.f;
  reader.open(0, most);
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t image = tile / p.tiles_of_image, first = (tile - image * p.tiles_of_image) * kBackPixels;
    const int count = static_cast<int>(a.pixels - first < kBackPixels ? a.pixels - first : kBackPixels);
    for (int64_t base = 0; base < a.channels; base += kWarps * kSliceChannels) {
      const int64_t channel = base + threadIdx.x / kWarp * kSliceChannels;
      FragmentC sums[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) sums[n] = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
      for (int from = 0; from < all; from += most) {
        const int classes = all - from < most ? all - from : most;
        if (base == 0 || most < all) {
          __syncthreads();
          if (most < all) {
            reader.open(from, classes);
            __syncthreads();
          }
          for (int i = threadIdx.x; i < rows * kBackPixels; i += kFeatureThreads) {
            const int k = i / kBackPixels, pixel = i % kBackPixels;
            gradient.set(k * pitch + pixel, k < classes && pixel < count ? reader.at(k, image, first + pixel) : 0.f);
          }
          __syncthreads();
        }
        if (channel >= a.channels) continue;
        for (int k = 0; k < classes; k += 8) {
          float w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int64_t c = channel + at.row(j);
            const int row = k + at.inner(j);
            const bool inside = c < a.channels && row < classes;
            w[j] = inside ? read_float(a.weight.data, a.weight.dtype, (from + row) * a.weight.stride[0] + c * a.weight.stride[1]) : 0.f;
          }
          const SplitA left = SplitA::make(w);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const int from_row = (k + at.t) * pitch + 8 * n + at.g;
            add_product(sums[n], left, SplitB::make(gradient[from_row], gradient[from_row + 4 * pitch]), exact, false);
          }
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
