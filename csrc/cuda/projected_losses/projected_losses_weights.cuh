// The weights' gradient in a launch of its own, for more classes or channels than a block of the main launch can keep sums of:
// the features are read a second time. And the small launch that adds up its parts, or the main launch's.
#pragma once

#include "projected_losses.cuh"

namespace hetero::cuda {

struct WeightsProblem {
  FeatureNetwork features[2];
  FeatureGrid grid;
  int classes, columns[2], splits;  // column blocks of both networks; each is taken by `splits` blocks
  const float* gradient[2];         // of the logits, [B, K, h, w]
  const unsigned* valid;
};

// A block has `Slices` slices of one network for each of its warps, and every `splits`-th tile.
template <int Slices, int ClassTiles, int Pixels>
__global__ void __launch_bounds__(kFeatureThreads, 1) weight_gradients_kernel(const __grid_constant__ WeightsProblem p) {
  constexpr int kPitch = Pixels + 4;
  const int all = p.columns[0] + p.columns[1], column = static_cast<int>(blockIdx.x) % all;
  const int which = column >= p.columns[0], first = (column - which * p.columns[0]) * Slices * kWarps;
  const int split = static_cast<int>(blockIdx.x) / all;
  const FeatureNetwork& network = p.features[which];
  const int slices = network.slices - first < Slices * kWarps ? network.slices - first : Slices * kWarps;
  const int class_tiles = class_tiles_of(p.classes);
  SharedAllocator memory(dynamic_shared_memory());
  const Shared<float> even = memory.take<float>(8 * class_tiles * kPitch), odd = memory.take<float>(8 * class_tiles * kPitch);
  const Shared<float> slots = memory.take<float>(p.grid.slots * kWarps * slice_words(Pixels, network.dtype == DType::kFloat ? 4 : 2));
  SliceStream<Pixels> stream(p.grid, slots, split, p.splits, network, first, slices, network, 0, false);
  WeightSums<Slices, ClassTiles, Pixels> sums;
  bool side = false;
  for (int t = split; t < p.grid.tiles; t += p.splits, side = !side) {
    const PixelTile tile = PixelTile::make<Pixels>(p.grid, t);
    // Two copies in turn: warps that are behind still read the other.
    const Shared<float> gradient = side ? odd : even;
    const float* from = p.gradient[which] + tile.image * p.classes * p.grid.pixels + tile.first;
    for (int i = threadIdx.x; i < 8 * class_tiles * Pixels; i += kFeatureThreads) {
      const int c = i / Pixels, pixel = i % Pixels;
      gradient.set(c * kPitch + pixel, c < p.classes && pixel < tile.count ? read(from + c * p.grid.pixels + pixel) : 0.f);
    }
    const unsigned valid = read(p.valid + t);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Slices; ++j) {
      if (j * kWarps + int(threadIdx.x / kWarp) >= slices) break;
      stream.wait(0);
      sums.add(j, stream, network, gradient, 0, class_tiles, valid);
      stream.refill();
      stream.pass();
    }
  }
#pragma unroll
  for (int j = 0; j < Slices; ++j) {
    const int slice = j * kWarps + threadIdx.x / kWarp;
    if (slice < slices) sums.store(j, first + slice, network, split, p.classes);
  }
}

constexpr int kFinishParts = 128;  // elements that a block of the last launch adds up

struct ProjectedFinish {
  float *weight[2], *bias[2];  // gradients, or null
  int64_t weight_slots, parts;    // of the weights, and of the rest: blocks of the main launch
  int64_t blocks[2];           // that add up a network's weights
};

// out[i] = the sum of slots[., i], in their order.
HK_DEVICE void add_slots(float* out, const float* slots, int64_t i, int64_t size, int64_t count) {
  if (!out || i >= size) return;
  float sum = 0.f;
  for (int64_t slot = 0; slot < count; ++slot) sum += read(slots + slot * size + i);
  write(out + i, sum);
}

HK_KERNEL void __launch_bounds__(kFinishParts) finish_projected_kernel(const __grid_constant__ ProjectedProblem p, const __grid_constant__ ProjectedFinish f) {
  int64_t block = blockIdx.x;
  for (int i = 0; i < 2; ++i) {
    if (block < f.blocks[i]) {
      const int64_t at = block * kFinishParts + threadIdx.x;
      return add_slots(f.weight[i], p.features[i].weight_slots, at, p.classes * p.features[i].channels, f.weight_slots);
    }
    block -= f.blocks[i];
  }
  for (int i = 0; i < 2; ++i) {
    for (int k = threadIdx.x; k < p.classes; k += kFinishParts) add_slots(f.bias[i], p.features[i].bias_slots, k, p.classes, f.parts);
  }
  if (p.output.maps) return;
  const float valid = static_cast<float>(read_back(p.output.valid));
  finish_loss(p, f.parts, valid == 0.f ? 0.f : 1.f / valid);
}

}  // namespace hetero::cuda
