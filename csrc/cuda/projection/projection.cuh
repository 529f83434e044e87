// Raw logits of features, z = W (f - f0), and their batch statistics (docs/cuda.md).
//
// A block has some tiles of pixels; the warps of a tile share its channels. Their parts of the logits are added up in shared
// memory, from which they are measured and written.
#pragma once

#include "../core/collectives.cuh"
#include "features.cuh"
#include "projection.h"

namespace hetero::cuda {

struct ProjectionProblem {
  FeatureNetwork features;
  FeatureGrid grid;
  DType rounding;
  int64_t batch;
  int classes, chunks, groups;
  const uint64_t* packed;  // see pack_weights_kernel
  float *logits, *pilot, *parts;  // parts [2, K, tiles]: each tile's mean and sum of squared differences; with the pilot
};

// As the region's dtype has them.
template <int Count>
HK_DEVICE void round_all(float (&x)[Count], DType to) {
  if (to == DType::kFloat) return;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    x[i] = to == DType::kHalf ? half_to_float(float_to_half(x[i]))
                              : __builtin_bit_cast(float, uint32_t(float_to_bfloat16(x[i])) << 16);
  }
}

HK_DEVICE float pilot_of(const float* pilot, int64_t channel, int64_t channels) {
  return pilot && channel < channels ? read(pilot + channel) : 0.f;
}

constexpr int kPilotRuns = 4, kPilotRun = 16, kPilotThreads = 128;

// A value near each channel's mean: the median of the means of four runs of neighbouring pixels, spread over batch and image, so
// that one pixel far from all others does not move it; of those that are numbers, 0 where none is. 16 lanes have a channel.
HK_KERNEL void __launch_bounds__(kPilotThreads) pilot_kernel(const __grid_constant__ ProjectionProblem p) {
  const FeatureNetwork& f = p.features;
  const int i = threadIdx.x % kPilotRun;
  const int64_t channel = int64_t(blockIdx.x) * (kPilotThreads / kPilotRun) + threadIdx.x / kPilotRun;
  const int64_t pixels = p.grid.pixels, run = pixels < kPilotRun ? pixels : kPilotRun;
  const int64_t c = channel < f.channels ? channel : f.channels - 1;
  float means[kPilotRuns];
  int numbers = 0;
#pragma unroll
  for (int r = 0; r < kPilotRuns; ++r) {
    const int64_t middle = (2 * r + 1) * pixels / (2 * kPilotRuns), n = (middle < pixels - run ? middle : pixels - run) + i;
    const int64_t y = n / p.grid.width, image = r * p.batch / kPilotRuns;
    const int64_t at = image * f.stride[0] + c * f.stride[1] + (f.flat ? n * f.stride[3] : y * f.stride[2] + (n - y * p.grid.width) * f.stride[3]);
    float sum = i < run ? read_float(f.data, f.dtype, at) : 0.f;
    for (int distance = kPilotRun / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    const float mean = sum / static_cast<float>(run);
    const bool finite = ::fabsf(mean) < INFINITY;
    numbers += finite;
    means[r] = finite ? mean : INFINITY;
  }
  const auto order = [&](int a, int b) {
    const float low = ::fminf(means[a], means[b]), high = ::fmaxf(means[a], means[b]);
    means[a] = low;
    means[b] = high;
  };
  order(0, 1);
  order(2, 3);
  order(0, 2);
  order(1, 3);
  order(1, 2);
  const float below = numbers <= 2 ? means[0] : means[1], above = numbers >= 4 ? means[2] : numbers >= 2 ? means[1] : means[0];
  if (i == 0 && channel < f.channels) write(p.pilot + channel, numbers ? 0.5f * below + 0.5f * above : 0.f);
}

// sums += the oldest slice of `stream`, number `slice`, by the packed weights of classes in tiles of 8 from `first_tile` on.
template <class T, bool PixelMajor, int RowTiles, int ClassTiles>
HK_DEVICE void project_packed(FragmentC (&sums)[RowTiles][ClassTiles], const SliceStream<16 * RowTiles>& stream,
                              const ProjectionProblem& p, int slice, int first_tile, int class_tiles) {
  constexpr int kAtOnce = 4;
  const LaneOfFragment at;
  const bool exact_weights = p.features.weight.dtype != DType::kFloat;
  const int tiles = class_tiles_of(p.classes);
#pragma unroll 1
  for (int s = 0; s < kSliceChannels / 8; ++s) {
    const int64_t channel = int64_t(slice) * kSliceChannels + 8 * s + at.t;
    const float centre[2] = {pilot_of(p.pilot, channel, p.features.channels), pilot_of(p.pilot, channel + 4, p.features.channels)};
    const int64_t step = int64_t(slice) * (kSliceChannels / 8) + s;
    const uint64_t* packed = p.packed + (step * tiles + first_tile) * kWarp + threadIdx.x % kWarp;
    float x[RowTiles * 4];
    stream.template read_as<T, PixelMajor>(false, x, [&](int i, int& c, int& pixel) {
      c = 8 * s + at.inner(i % 4);
      pixel = i / 4 * 16 + at.row(i % 4);
    });
    round_all(x, p.rounding);
#pragma unroll
    for (int i = 0; i < RowTiles * 4; ++i) x[i] -= centre[i % 4 >> 1];
    SplitFeatures a[RowTiles];
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) a[r] = SplitFeatures::make(x + 4 * r);
#pragma unroll
    for (int some = 0; some < ClassTiles; some += kAtOnce) {
      if (some >= class_tiles) continue;
      uint64_t w[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) w[i] = some + i < class_tiles ? read(packed + (some + i) * int(kWarp)) : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (some + i >= class_tiles) continue;
        const SplitB b = unpacked(w[i]);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) add_product(sums[r][some + i], a[r], b, false, exact_weights);
      }
    }
  }
}

// The warps' parts of a block's logits: [warp][fragment's element][lane].
template <int RowTiles, int ClassTiles>
struct LogitParts {
  static constexpr int kPixels = 16 * RowTiles, kElements = kRoundFragments * 4 * int(kWarp);
  static constexpr int kTiles = kRoundFragments / RowTiles;  // of classes, that are added up at a time

  const Shared<float> parts;

  HK_DEVICE void put(const FragmentC (&sums)[RowTiles][ClassTiles], int first) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kRoundFragments * 4; ++i) {
      parts.set(warp * kElements + i * int(kWarp) + lane, sums[i / 4 / kTiles][first + i / 4 % kTiles].x[i % 4]);
    }
  }

  // Adds up what the warps of each of `groups` tiles have, into the first one's place.
  HK_DEVICE void add_up(int groups) const {
    for (int e = threadIdx.x; e < groups * kElements; e += kFeatureThreads) {
      float sum = parts[e];
      for (int other = e + groups * kElements; other < kWarps * kElements; other += groups * kElements) sum += parts[other];
      parts.set(e, sum);
    }
  }

  // Of a tile's class, counted from the round's first.
  HK_DEVICE float at(int group, int c, int pixel) const {
    const int fragment = pixel / 16 * kTiles + c / 8, i = (pixel % 16 / 8) * 2 + c % 2;
    return parts[group * kElements + (fragment * 4 + i) * int(kWarp) + pixel % 8 * 4 + c % 8 / 2];
  }
};

// The sum over `Size` neighbouring lanes, for each of them.
template <int Size>
HK_DEVICE float add_over_lanes(float x) {
  for (int distance = Size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Features' channels come slice by slice through a ring (SliceStream), packed weights through the caches. Layouts and element
// types are told apart once, and have loops of their own.
template <int RowTiles, int ClassTiles>
__global__ void __launch_bounds__(kFeatureThreads, ClassTiles == kFewClassTiles ? 2 : 1)
    project_kernel(const __grid_constant__ ProjectionProblem p) {
  using Parts = LogitParts<RowTiles, ClassTiles>;
  constexpr int kPixels = Parts::kPixels;
  const FeatureNetwork& network = p.features;
  const int chunk = static_cast<int>(blockIdx.x) % p.chunks, first_class = chunk * 8 * ClassTiles;
  const int64_t first_tile = int64_t(static_cast<int>(blockIdx.x) / p.chunks) * p.groups;
  const int classes = p.classes - first_class < 8 * ClassTiles ? p.classes - first_class : 8 * ClassTiles;
  const int class_tiles = class_tiles_of(classes), warp = threadIdx.x / kWarp;
  const int begin = warp / p.groups, every = kWarps / p.groups;  // of the warp's slices
  const int64_t mine = first_tile + warp % p.groups;
  const int tile = static_cast<int>(mine < p.grid.tiles ? mine : p.grid.tiles);
  SharedAllocator memory(dynamic_shared_memory());
  const Parts parts{memory.take<float>(kWarps * Parts::kElements)};
  const int words = slice_words(kPixels, network.dtype == DType::kFloat ? 4 : 2);
  SliceStream<kPixels> stream(p.grid, memory.take<float>(p.grid.slots * kWarps * words), tile, p.grid.tiles, network, 0, network.slices,
                              network, 0, false, begin, every);
  FragmentC sums[RowTiles][ClassTiles];
#pragma unroll
  for (int i = 0; i < RowTiles * ClassTiles; ++i) sums[i / ClassTiles][i % ClassTiles] = {{0.f, 0.f, 0.f, 0.f}};
  with_layout(network, [&]<class T, bool PixelMajor>() {
#pragma unroll 1
    for (int slice = begin; tile < p.grid.tiles && slice < network.slices; slice += every) {
      stream.wait(0);
      project_packed<T, PixelMajor>(sums, stream, p, slice, chunk * ClassTiles, class_tiles);
      stream.template refill_as<T, PixelMajor>();
      stream.pass();
    }
  });
#pragma unroll
  for (int first = 0; first < ClassTiles; first += Parts::kTiles) {
    if (first >= class_tiles) continue;
    if (first > 0) __syncthreads();
    parts.put(sums, first);
    __syncthreads();
    parts.add_up(p.groups);
    __syncthreads();
    // A class of a tile is some lanes'.
    for (int row = threadIdx.x / kPixels; row < p.groups * 8 * Parts::kTiles; row += kFeatureThreads / kPixels) {
      const int group = row / (8 * Parts::kTiles), c = row % (8 * Parts::kTiles), k = first_class + 8 * first + c;
      if (first_tile + group >= p.grid.tiles) continue;
      const int pixel = threadIdx.x % kPixels;
      const PixelTile at = PixelTile::make<kPixels>(p.grid, static_cast<int>(first_tile + group));
      const float z = parts.at(group, c, pixel);
      const bool inside = pixel < at.count && k < p.classes;
      if (inside) write(p.logits + (at.image * p.classes + k) * p.grid.pixels + at.first + pixel, z);
      if (!p.parts) continue;
      const float mean = add_over_lanes<kPixels>(inside ? z : 0.f) / static_cast<float>(at.count);
      const float off = inside ? z - mean : 0.f, squares = add_over_lanes<kPixels>(off * off);
      if (pixel != 0 || k >= p.classes) continue;
      write(p.parts + int64_t(k) * p.grid.tiles + first_tile + group, mean);
      write(p.parts + int64_t(p.classes + k) * p.grid.tiles + first_tile + group, squares);
    }
  }
}

constexpr int kStatisticsThreads = 128;

// A class of `out` [4, K]: number of pixels, mean, sum of squared differences from it, weight times pilot; of tiles of `size`
// pixels; `inverse`: of the number.
HK_KERNEL void __launch_bounds__(kStatisticsThreads) statistics_kernel(const __grid_constant__ ProjectionProblem p, int size, double inverse,
                                                                       double* out) {
  SharedAllocator memory(dynamic_shared_memory());
  constexpr int kStatisticsWarps = kStatisticsThreads / int(kWarp);
  const Shared<double> first = memory.take<double>(kStatisticsWarps), second = memory.take<double>(kStatisticsWarps),
                       third = memory.take<double>(kStatisticsWarps);
  const int64_t k = blockIdx.x, tiles = p.grid.tiles;
  const float *means = p.parts + k * tiles, *squares = p.parts + (p.classes + k) * tiles;
  const auto number = [&](int64_t tile) {
    const int64_t left = p.grid.pixels - tile % p.grid.tiles_of_image * size;
    return static_cast<double>(left < size ? left : size);
  };
  const double pixels = static_cast<double>(p.batch) * static_cast<double>(p.grid.pixels);
  double sum = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kStatisticsThreads) sum += number(tile) * read(means + tile);
  const double mean = sum_over_block(sum, first) * inverse;
  sum = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kStatisticsThreads) {
    const double off = read(means + tile) - mean;
    sum += read(squares + tile) + number(tile) * off * off;
  }
  const double all = sum_over_block(sum, second);
  const Matrix& w = p.features.weight;
  sum = 0;
  for (int64_t c = threadIdx.x; c < p.features.channels; c += kStatisticsThreads) {
    sum += double(read_float(w.data, w.dtype, k * w.stride[0] + c * w.stride[1])) * read(p.pilot + c);
  }
  const double offset = sum_over_block(sum, third);
  if (threadIdx.x != 0) return;
  write(out + k, pixels);
  write(out + p.classes + k, mean);
  write(out + 2 * p.classes + k, all);
  write(out + 3 * p.classes + k, offset);
}

}  // namespace hetero::cuda
