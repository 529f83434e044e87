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

// The logits' gradient of a tile in the order in which lanes want it, [8 classes][8 pixels][lane]: both parts of pixels t and
// t + 4 of class g; and which pixels have any, each warp's share of them.
template <int Pixels>
struct StagedGradient {
  static constexpr int kSteps = Pixels / 8;

  const Shared<Wide> parts;
  const Shared<unsigned> reached;

  HK_DEVICE StagedGradient(int class_tiles, SharedAllocator& memory)
      : parts(memory.take<Wide>(class_tiles * kSteps * kWarp)), reached(memory.take<unsigned>(kWarps)) {}

  // A barrier must follow.
  HK_DEVICE void stage(const LogitGradientReader& reader, const PixelTile& tile, int classes,
                       int64_t pixels_of_image) const {
    const LaneOfFragment at;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    constexpr int kNext = kWarps / kSteps * 8;  // classes: a warp's pixels are the same in all
    const int pixel = warp % kSteps * 8 + at.t;
    const bool inside[2] = {pixel < tile.count, pixel + 4 < tile.count};
    bool any[2] = {false, false};
    int k = warp / kSteps * 8 + at.g;
    int64_t place = reader.place(k, tile.image, tile.first + pixel);
    for (int i = warp; i < class_tiles_of(classes) * kSteps; i += kWarps, k += kNext, place += kNext * pixels_of_image) {
      float g[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        g[j] = inside[j] && k < classes ? reader.at(k, place + 4 * j) : 0.f;
        any[j] = any[j] || !(g[j] == 0.f);
      }
      parts.set(i * int(kWarp) + lane, SplitB::make(g[0], g[1]).words());
    }
    unsigned bits = unsigned(any[0]) << pixel | unsigned(any[1]) << (pixel + 4);
    for (int distance = 1; distance < int(kWarp); distance *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, distance);
    if (lane == 0) reached.set(warp, bits);
  }

  HK_DEVICE unsigned pixels() const {
    unsigned all = 0;
    for (int w = 0; w < kWarps; ++w) all |= reached[w];
    return all;
  }

  HK_DEVICE SplitB at(int class_tile, int step) const {
    return SplitB::of(parts[(class_tile * kSteps + step) * int(kWarp) + int(threadIdx.x % kWarp)]);
  }
};

// sums += `Together` of the warp's slices by a tile's gradient, the first of which is number `slice` and the oldest of `stream`;
// the second may not be there: then its sums mean nothing.
template <class T, bool PixelMajor, int Together, int ClassTiles, int Pixels>
HK_DEVICE void add_slices(FragmentC (*sums)[ClassTiles], const SliceStream<Pixels>& stream, const ProjectionWeightsProblem& p,
                          int slice, bool both, const StagedGradient<Pixels>& gradient, int class_tiles, unsigned valid) {
  const LaneOfFragment at;
  float centre[Together][2];
#pragma unroll
  for (int i = 0; i < 2 * Together; ++i) {
    const int64_t channel = int64_t(slice + i / 2 * kWarps) * kSliceChannels + at.row(i);
    centre[i / 2][i % 2] = pilot_of(p.pilot, channel, p.features.channels);
  }
#pragma unroll 1
  for (int s = 0; s < Pixels / 8; ++s) {
    SplitFeatures a[Together];
#pragma unroll
    for (int r = 0; r < Together; ++r) {
      float x[4];
      stream.template read_as<T, PixelMajor>(r > 0 && both, x, [&](int i, int& channel, int& pixel) {
        channel = at.row(i);
        pixel = 8 * s + at.inner(i);
      });
      round_all(x, p.rounding);
      // Features that no gradient reaches, perhaps NaN, are taken as 0.
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = valid >> (8 * s + at.inner(i)) & 1 ? x[i] - centre[r][i & 1] : 0.f;
      a[r] = SplitFeatures::make(x);
    }
#pragma unroll
    for (int n = 0; n < ClassTiles; ++n) {
      if (n >= class_tiles) continue;
      const SplitB b = gradient.at(n, s);
#pragma unroll
      for (int r = 0; r < Together; ++r) add_product(sums[r][n], a[r], b, false, false);
    }
  }
}

// A block has `Slices` slices for each of its warps, a chunk of classes and every `splits`-th tile. Two of a warp's slices are
// multiplied by what is read of the gradient at a time.
template <int Slices, int ClassTiles, int Pixels>
__global__ void __launch_bounds__(kFeatureThreads, 1) projection_weights_kernel(const __grid_constant__ ProjectionWeightsProblem p) {
  constexpr int kTogether = Slices > 1 ? 2 : 1;
  const FeatureNetwork& network = p.features;
  const int column = static_cast<int>(blockIdx.x) % p.columns, rest = static_cast<int>(blockIdx.x) / p.columns;
  const int first_class = rest % p.chunks * 8 * ClassTiles, split = rest / p.chunks, first = column * Slices * kWarps;
  const int classes = p.classes - first_class < 8 * ClassTiles ? p.classes - first_class : 8 * ClassTiles;
  const int slices = network.slices - first < Slices * kWarps ? network.slices - first : Slices * kWarps;
  const int class_tiles = class_tiles_of(classes), warp = threadIdx.x / kWarp;
  SharedAllocator memory(dynamic_shared_memory());
  LogitGradientReader reader(p.gradient, p.classes, p.grid.pixels, 8 * class_tiles, memory);
  // Two in turn: warps that are behind still read the other.
  const StagedGradient<Pixels> gradients[2] = {{class_tiles, memory}, {class_tiles, memory}};
  const Shared<float> slots = memory.take<float>(p.grid.slots * kWarps * slice_words(Pixels, network.dtype == DType::kFloat ? 4 : 2));
  SliceStream<Pixels> stream(p.grid, slots, split, p.splits, network, first, slices, network, 0, false);
  FragmentC sums[Slices][ClassTiles];
#pragma unroll
  for (int i = 0; i < Slices * ClassTiles; ++i) sums[i / ClassTiles][i % ClassTiles] = {{0.f, 0.f, 0.f, 0.f}};
  reader.open(first_class, classes);
  __syncthreads();
  with_layout(network, [&]<class T, bool PixelMajor>() {
    bool side = false;
#pragma unroll 1
    for (int t = split; t < p.grid.tiles; t += p.splits, side = !side) {
      const StagedGradient<Pixels> gradient = side ? gradients[1] : gradients[0];
      gradient.stage(reader, PixelTile::make<Pixels>(p.grid, t), classes, p.grid.pixels);
      __syncthreads();
      const unsigned valid = gradient.pixels();
#pragma unroll
      for (int j = 0; j < Slices; j += kTogether) {
        const int slice = j * kWarps + warp;
        if (slice >= slices) break;
        const bool both = kTogether > 1 && slice + kWarps < slices;
        stream.wait(both);
        add_slices<T, PixelMajor, kTogether>(sums + j, stream, p, first + slice, both, gradient, class_tiles, valid);
#pragma unroll 1
        for (int i = 0; i <= both; ++i) {
          stream.template refill_as<T, PixelMajor>();
          stream.pass();
        }
      }
    }
  });
#pragma unroll
  for (int j = 0; j < Slices; ++j) {
    const int slice = j * kWarps + warp;
    if (slice < slices) store_sums(sums[j], first + slice, network, split, p.classes, first_class);
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
