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
  const int rows = 8 * class_tiles_of(most);
  SharedAllocator memory(dynamic_shared_memory());
  // In the order in which lanes want it, [8 classes][8 pixels][lane]: both parts of classes t and t + 4 of pixel g.
  const Shared<Wide> gradient = memory.take<Wide>(rows / 8 * kTiles * int(kWarp));
  LogitGradientReader reader(a.gradient, all, a.pixels, rows, memory);
  const LaneOfFragment at;
  const int lane = threadIdx.x % kWarp;
  const bool exact = a.weight.dtype != DType::kFloat;
  const float factor = a.factor ? read(a.factor) : 1.f;
  // A lane's two columns of a product are neighbours in memory, and an even number of pixels keeps them so.
  const bool pairs = a.pixel_stride == 1 && a.pixels % 2 == 0 && reinterpret_cast<uint64_t>(a.out) % 8 == 0;
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
          constexpr int kNext = kWarps / kTiles * 8;  // classes: a warp's pixels are the same in all
          const int warp = threadIdx.x / kWarp, pixel = warp % kTiles * 8 + at.g;
          int k = warp / kTiles * 8 + at.t;
          int64_t place = reader.place(k, image, first + pixel);
          const auto given = [&](int beside) {
            return pixel < count && k + beside < classes ? reader.at(k + beside, place + beside * a.pixels) : 0.f;
          };
          for (int i = warp; i < class_tiles_of(classes) * kTiles; i += kWarps, k += kNext, place += kNext * a.pixels) {
            gradient.set(i * int(kWarp) + lane, SplitB::make(given(0), given(4)).words());
          }
          __syncthreads();
        }
        if (channel >= a.channels) continue;
        // What lies beyond is read from the last channel or class: not written, and multiplied by gradients of 0.
        int64_t column[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t c = channel + at.row(i) < a.channels ? channel + at.row(i) : a.channels - 1;
          column[i] = c * a.weight.stride[1];
        }
        for (int k = 0; k < classes; k += 8) {
          float w[4];
          const auto read_weights = [&]<class T>() {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int row = k + at.inner(j) < classes ? k + at.inner(j) : classes - 1;
              const T* from_row = static_cast<const T*>(a.weight.data) + (from + row) * a.weight.stride[0];
              w[j] = widened(read(from_row + column[j & 1]), a.weight.dtype);
            }
          };
          if (exact) {
            read_weights.template operator()<uint16_t>();
          } else {
            read_weights.template operator()<float>();
          }
          const SplitA left = SplitA::make(w);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            add_product(sums[n], left, SplitB::of(gradient[(k / 8 * kTiles + n) * int(kWarp) + lane]), exact, false);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int64_t c = channel + at.sum_row(i);
        if (c >= a.channels) continue;
        const int64_t out = image * a.channels * a.pixels + c * a.channel_stride + (first + at.sum_column(i)) * a.pixel_stride;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (8 * n + at.sum_column(i) >= count) continue;
          const float x = sums[n].x[i] * factor, y = sums[n].x[i + 1] * factor;
          const int64_t pixel = out + 8 * n * a.pixel_stride;
          if (pairs) {
            write_floats(a.out, a.dtype, pixel, x, y);
          } else {
            write_float(a.out, a.dtype, pixel, x);
            if (8 * n + at.sum_column(i + 1) < count) write_float(a.out, a.dtype, pixel + a.pixel_stride, y);
          }
        }
      }
    }
  }
}

}  // namespace hetero::cuda
