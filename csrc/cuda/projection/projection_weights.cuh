// The weight's gradient, the sum over pixels of the logits' gradient times f - f0; the features' second read.
#pragma once

#include "logit_gradient.cuh"
#include "projection.cuh"

namespace hetero::cuda {

struct ProjectionWeightsProblem {
  FeatureNetwork features;  // weight_slots: [splits, K, C]
  FeatureGrid grid;
  DType rounding;
  int classes, columns, chunks, splits;
  const float* pilot;
  LogitGradient gradient;
};

// A block has `Slices` slices for each of its warps, a chunk of classes and every `splits`-th tile.
template <int Slices, int ClassTiles, int Pixels>
__global__ void __launch_bounds__(kFeatureThreads, 1) projection_weights_kernel(const __grid_constant__ ProjectionWeightsProblem p) {
  constexpr int kPitch = Pixels + 4;
  const FeatureNetwork& network = p.features;
  const int column = static_cast<int>(blockIdx.x) % p.columns, rest = static_cast<int>(blockIdx.x) / p.columns;
  const int first_class = rest % p.chunks * 8 * ClassTiles, split = rest / p.chunks, first = column * Slices * kWarps;
  const int classes = p.classes - first_class < 8 * ClassTiles ? p.classes - first_class : 8 * ClassTiles;
  const int slices = network.slices - first < Slices * kWarps ? network.slices - first : Slices * kWarps;
  const int class_tiles = class_tiles_of(classes), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  SharedAllocator memory(dynamic_shared_memory());
  LogitGradientReader reader(p.gradient, p.classes, p.grid.pixels, 8 * class_tiles, memory);
  const Shared<float> gradients[2] = {memory.take<float>(8 * class_tiles * kPitch), memory.take<float>(8 * class_tiles * kPitch)};
  const Shared<unsigned> reached[2] = {memory.take<unsigned>(kWarps), memory.take<unsigned>(kWarps)};
  const Shared<float> slots = memory.take<float>(p.grid.slots * kWarps * slice_words(Pixels, network.dtype == DType::kFloat ? 4 : 2));
  SliceStream<Pixels> stream(p.grid, slots, split, p.splits, network, first, slices, network, 0, false);
  WeightSums<Slices, ClassTiles, Pixels> sums;
  const LaneOfFragment at;
  const bool exact = exact_factors(network, p.rounding, p.pilot);
  reader.open(first_class, classes);
  __syncthreads();
  bool side = false;
  for (int t = split; t < p.grid.tiles; t += p.splits, side = !side) {
    const PixelTile tile = PixelTile::make<Pixels>(p.grid, t);
    // Two copies in turn: warps that are behind still read the other.
    const Shared<float> gradient = side ? gradients[1] : gradients[0];
    const Shared<unsigned> bits = side ? reached[1] : reached[0];
    bool any = false;  // of the thread's pixel, which is the same in every row
    for (int i = threadIdx.x; i < 8 * class_tiles * Pixels; i += kFeatureThreads) {
      const int k = i / Pixels, pixel = i % Pixels;
      const float g = k < classes && pixel < tile.count ? reader.at(k, tile.image, tile.first + pixel) : 0.f;
      any = any || !(g == 0.f);
      gradient.set(k * kPitch + pixel, g);
    }
    const unsigned of_warp = __ballot_sync(kAllLanes, any);
    if (lane == 0) bits.set(warp, of_warp);
    __syncthreads();
    unsigned valid = 0;
    for (int w = 0; w < kWarps; ++w) valid |= bits[w];
    if (Pixels == 16) valid |= valid >> 16;
#pragma unroll
    for (int j = 0; j < Slices; ++j) {
      const int slice = j * kWarps + warp;
      if (slice >= slices) break;
      const int64_t channel = int64_t(first + slice) * kSliceChannels + at.g;
      const float centre[2] = {pilot_of(p.pilot, channel, network.channels), pilot_of(p.pilot, channel + 8, network.channels)};
      stream.wait(0);
      sums.add(j, stream, network, gradient, class_tiles, valid, exact,
               [&](int i, float x) { return rounded(x, p.rounding) - centre[i & 1]; });
      stream.refill();
      stream.pass();
    }
  }
#pragma unroll
  for (int j = 0; j < Slices; ++j) {
    const int slice = j * kWarps + warp;
    if (slice < slices) sums.store(j, first + slice, network, split, p.classes, first_class);
  }
}

constexpr int kFinishWeights = 128;  // elements that a block of the last launch adds up

// `out` [K, C]: the parts, in their order, and what the pilot's share of the running mean gets.
HK_KERNEL void __launch_bounds__(kFinishWeights) finish_weights_kernel(const __grid_constant__ ProjectionWeightsProblem p, float* out) {
  const int64_t channels = p.features.channels, size = p.classes * channels;
  const int64_t i = int64_t(blockIdx.x) * kFinishWeights + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int split = 0; split < p.splits; ++split) sum += read(p.features.weight_slots + split * size + i);
  if (p.gradient.by_statistics && p.pilot) {
    const int64_t k = i / channels;
    const double offset = read(p.gradient.by_statistics + 3 * p.classes + k);
    sum = ::fmaf(static_cast<float>(offset), read(p.pilot + (i - k * channels)), sum);
  }
  write(out + i, sum);
}

}  // namespace hetero::cuda
