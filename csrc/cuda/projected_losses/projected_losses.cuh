// HeteroAKD on features at their own resolution: projections, the loss and the logits' gradient in one pass over the features,
// and the weights' gradient from the tile that is still on chip, where it fits (docs/cuda.md).
//
// A block takes tiles of pixels, one after the other. Warps project their slices of channels; their parts of the logits are
// added up in shared memory; lanes that share a pixel evaluate it; warps take its gradient to the weights of their slices.
#pragma once

#include "../pixel_losses/reduction.cuh"
#include "../projection/features.cuh"
#include "projected_losses.h"

namespace hetero::cuda {

struct ProjectedProblem : HakdProblem {
  FeatureNetwork features[2];  // student, teacher
  FeatureGrid grid;
  const uint64_t* packed;  // weights, see pack_weights_kernel; null where they are in shared memory
  unsigned* valid;  // [tiles]: bits of the pixels that count, for the weights' gradient in a launch of its own; or null
};

// What a main kernel is compiled for: tiles of 16 RowTiles pixels, 8 ClassTiles classes; OnChip: the weights' gradient is taken
// from the tile on chip; Resident: the weights are in shared memory.
template <int RowTiles_, int ClassTiles_, bool OnChip_, bool Resident_>
struct ProjectedShape {
  static constexpr int RowTiles = RowTiles_, ClassTiles = ClassTiles_, Pixels = 16 * RowTiles, Classes = 8 * ClassTiles;
  static constexpr bool OnChip = OnChip_, Resident = Resident_;
  static constexpr int Lanes = kFeatureThreads / Pixels, ClassesPerLane = Classes / Lanes;
  static constexpr int LaneShift = Lanes == 8 ? 3 : 4;
};

// A block's tile on its way through the kernel.
template <class Shape>
struct ProjectedTile {
  static constexpr int kPitch = Shape::Pixels + 4;

  const ProjectedProblem& p;
  const CommonArrays common;
  Shared<float> logits[2];      // [8 class tiles][pixels]
  Shared<float> gradients;      // [networks][8 class tiles][pixels]
  Shared<float> bias_sums[2];   // of the gradient over the block's pixels, by class: a thread's own
  Shared<float> parts;          // of logits, by warp
  Shared<float> scales;         // of both terms' gradients
  Shared<int> counts;           // whether a pixel counts
  const int class_tiles;

  HK_DEVICE ProjectedTile(const ProjectedProblem& problem, SharedAllocator& memory)
      : p(problem), common(memory, ClassOrder(1, 1)), class_tiles(class_tiles_of(problem.classes)) {
    for (int i = 0; i < 2; ++i) {
      logits[i] = memory.take<float>(8 * class_tiles * kPitch);
      bias_sums[i] = memory.take<float>(p.classes);
      if (int(threadIdx.x) < p.classes) bias_sums[i].set(threadIdx.x, 0.f);
    }
    gradients = memory.take<float>(2 * gradient_of(1));
    parts = memory.take<float>(kWarps * kRoundFragments * 4 * kWarp);
    scales = memory.take<float>(2);
    counts = memory.take<int>(Shape::Pixels);
  }

  // Where a network's gradients begin. A number and no pointer: of one that is chosen among two the compiler no longer knows that
  // it is to shared memory.
  HK_DEVICE int gradient_of(int which) const { return which * 8 * class_tiles * kPitch; }

  // One network's logits from the warp's slices, of which `taken` were the other network's. Returns whether the thread saw one
  // beyond the limit of the unguarded mathematics; a barrier must follow.
  template <class Weights>
  HK_DEVICE bool project(int which, SliceStream<Shape::Pixels>& stream, Weights& weights, int& taken) const {
    const FeatureNetwork& network = p.features[which];
    const bool exact = network.dtype != DType::kFloat, exact_weights = network.weight.dtype != DType::kFloat;
    FragmentC sums[Shape::RowTiles][Shape::ClassTiles];
#pragma unroll
    for (int r = 0; r < Shape::RowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < Shape::ClassTiles; ++n) sums[r][n] = {{0.f, 0.f, 0.f, 0.f}};
    }
    const int first = which ? p.features[0].slices : 0;
#pragma unroll 1
    for (; taken * kWarps + int(threadIdx.x / kWarp) - first < network.slices; ++taken) {
      const int channel = (taken * kWarps + int(threadIdx.x / kWarp) - first) * kSliceChannels;
      stream.wait(Shape::OnChip ? taken : 0);
      SliceElements<Shape::RowTiles> x;
      read_slice<Shape::RowTiles>(x, stream, network);
      if (!Shape::OnChip) stream.refill();
      if (exact) {
        project_slice<true>(sums, x, weights, which, channel, class_tiles, exact_weights);
      } else {
        project_slice<false>(sums, x, weights, which, channel, class_tiles, false);
      }
      stream.pass();
    }
    return add_up(which, network, sums);
  }

  // Adds up the warps' parts of the logits, and the bias.
  HK_DEVICE bool add_up(int which, const FeatureNetwork& network, const FragmentC (&sums)[Shape::RowTiles][Shape::ClassTiles]) const {
    constexpr int kElements = kRoundFragments * 4 * kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    bool beyond = false;
#pragma unroll
    for (int first = 0; first < Shape::RowTiles * Shape::ClassTiles; first += kRoundFragments) {
      if (first % Shape::ClassTiles >= class_tiles) continue;
      if (first > 0) __syncthreads();
#pragma unroll
      for (int i = 0; i < kRoundFragments * 4; ++i) {
        const int f = first + i / 4;
        parts.set(warp * kElements + i * kWarp + lane, sums[f / Shape::ClassTiles][f % Shape::ClassTiles].x[i % 4]);
      }
      __syncthreads();
      for (int e = threadIdx.x; e < kElements; e += kFeatureThreads) {
        const int f = first + e / (4 * kWarp), i = e / kWarp % 4, g = e % kWarp / 4, t = e % 4;
        const int c = f % Shape::ClassTiles * 8 + 2 * t + (i & 1), pixel = f / Shape::ClassTiles * 16 + g + 8 * (i >> 1);
        if (c >= 8 * class_tiles) continue;
        float z = 0.f;
        for (int w = 0; w < kWarps; ++w) z += parts[w * kElements + e];
        if (c < p.classes && network.bias.data) z += read_float(network.bias.data, network.bias.dtype, c * network.bias.stride[0]);
        logits[which].set(c * kPitch + pixel, z);
        beyond = beyond || ::fabsf(z) > p.limit;
      }
    }
    return beyond;
  }

  // The loss at the tile's pixels, and the gradient of their logits.
  HK_DEVICE void evaluate(const PixelTile& tile, bool bounded, PixelTerms& terms) const {
    const ClassShare share(p.classes, Shape::LaneShift, threadIdx.x);
    const int column = threadIdx.x / Shape::Lanes;
    const bool inside = column < tile.count;
    const int64_t n = tile.first + (inside ? column : 0), y = n / p.grid.width, x = n - y * p.grid.width;
    const int64_t label = read_label(p.labels.data, p.labels.type, label_row(p, tile.image, y) + label_column(p, x));
    const int64_t* upstream = p.upstream_stride;
    const Pixel pixel = Pixel::make(
        Pixel::class_of(p, label), inside, p.upstream ? read(p.upstream + tile.image * upstream[0] + y * upstream[1] + x * upstream[2]) : 1.f);
    if (share.member == 0) counts.set(column, pixel.valid);

    const float scale[2] = {scales[0], scales[1]};
    const HakdPixelLoss<false, 0, true, false, Shape::ClassesPerLane> loss(p, share, scale);
    const auto at = [&](int i) { return share.number(i) * kPitch + column; };
    const auto errors = [&](int i, Value s, Value t) {
      gradients.set(at(i), s.v);
      gradients.set(gradient_of(1) + at(i), t.v);
    };
    const auto add = [&](int i, Value g) { gradients.set(at(i), gradients[at(i)] + g.v); };
    const auto record = [&](Value hakd, Value proj) {
      if (share.member == 0) terms.record(pixel, [&] { return inside ? tile.image * p.grid.pixels + n : -1; }, hakd, proj);
    };
    for (int c = p.classes + share.member; c < 8 * class_tiles; c += Shape::Lanes) {
      gradients.set(c * kPitch + column, 0.f);
      gradients.set(gradient_of(1) + c * kPitch + column, 0.f);
    }
    if (bounded) {
      const float unit = loss.unit();
      loss.unguarded(pixel, true, [&](int i) { return Value(logits[0][at(i)] * unit); },
                     [&](int i) { return Value(logits[1][at(i)] * unit); }, errors, record, add);
    } else {
      loss.guarded(pixel, tile.image, true, [&](int i) { return Value(logits[0][at(i)]); },
                   [&](int i) { return Value(logits[1][at(i)]); }, errors, record, add);
    }
  }

  // After a barrier: the logits' gradient to memory, and what it adds to the bias's.
  HK_DEVICE void hand_on(int which, const PixelTile& tile) const {
    const FeatureNetwork& network = p.features[which];
    if (network.logit_gradient) {
      float* out = network.logit_gradient + tile.image * p.classes * p.grid.pixels + tile.first;
      for (int i = threadIdx.x; i < p.classes * Shape::Pixels; i += kFeatureThreads) {
        const int c = i / Shape::Pixels, pixel = i % Shape::Pixels;
        if (pixel < tile.count) write(out + c * p.grid.pixels + pixel, gradients[gradient_of(which) + c * kPitch + pixel]);
      }
    }
    if (network.bias_slots && int(threadIdx.x) < p.classes) {
      float sum = 0.f;
      for (int pixel = 0; pixel < Shape::Pixels; ++pixel) sum += gradients[gradient_of(which) + threadIdx.x * kPitch + pixel];
      bias_sums[which].set(threadIdx.x, bias_sums[which][threadIdx.x] + sum);
    }
  }

  // Bits of the pixels that count, to every thread.
  HK_DEVICE unsigned valid_pixels() const {
    const int lane = threadIdx.x % kWarp;
    return __ballot_sync(kAllLanes, lane < Shape::Pixels && counts[lane % Shape::Pixels] != 0);
  }
};

template <class Shape>
__global__ void __launch_bounds__(kFeatureThreads, 1) projected_hakd_kernel(const __grid_constant__ ProjectedProblem p) {
  SharedAllocator memory(dynamic_shared_memory());
  const ProjectedTile<Shape> block(p, memory);
  const FeatureNetwork &student = p.features[0], &teacher = p.features[1];
  auto weights = [&] {
    if constexpr (Shape::Resident) {
      return ResidentWeights(student, teacher, p.classes, memory);
    } else {
      return PackedWeights<Shape::ClassTiles>(p.packed, p.classes, student.slices + teacher.slices);
    }
  }();
  if constexpr (Shape::Resident) {
    weights.stage(0, student);
    weights.stage(1, teacher);
  }
  const int words = slice_words(Shape::Pixels, student.dtype == DType::kFloat || teacher.dtype == DType::kFloat ? 4 : 2);
  SliceStream<Shape::Pixels> stream(p.grid, memory.take<float>(p.grid.slots * kWarps * words), blockIdx.x, gridDim.x, student, 0,
                                    student.slices, teacher, teacher.slices, Shape::OnChip);
  for (int i = 0; i < 2; ++i) {
    const float scale = p.term[i].weight * p.term[i].share * inverse_divisor(p.term[i], block.common.scratch[i]);
    if (threadIdx.x == 0) block.scales.set(i, scale);
  }
  if (Shape::Resident) stream.wait_for_earlier();
  __syncthreads();
  PixelTerms terms(p);
  WeightSums<Shape::OnChip ? kMostSlices : 1, Shape::ClassTiles, Shape::Pixels> weight_sums;
  for (int t = blockIdx.x; t < p.grid.tiles; t += gridDim.x) {
    const PixelTile tile = PixelTile::make<Shape::Pixels>(p.grid, t);
    int taken = 0;
    weights.start();
    bool beyond = block.project(0, stream, weights, taken);
    __syncthreads();
    beyond = block.project(1, stream, weights, taken) || beyond;
    const bool bounded = !__syncthreads_or(beyond);
    block.evaluate(tile, bounded, terms);
    __syncthreads();
    block.hand_on(0, tile);
    block.hand_on(1, tile);
    const unsigned valid = block.valid_pixels();
    if (p.valid && threadIdx.x == 0) write(p.valid + t, valid);
    if constexpr (Shape::OnChip) {
#pragma unroll
      for (int j = 0; j < kMostSlices; ++j) {
        const int slice = j * kWarps + threadIdx.x / kWarp, which = slice >= student.slices;
        if (slice >= student.slices + teacher.slices) break;
        const FeatureNetwork& network = p.features[which];
        if (network.weight_slots) {
          weight_sums.add(j, stream, network, block.gradients, block.gradient_of(which), block.class_tiles, valid);
        }
        stream.refill();
        stream.pass();
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (p.features[i].bias_slots && int(threadIdx.x) < p.classes) {
      write(p.features[i].bias_slots + int64_t(blockIdx.x) * p.classes + threadIdx.x, block.bias_sums[i][threadIdx.x]);
    }
  }
  if constexpr (Shape::OnChip) {
#pragma unroll
    for (int j = 0; j < kMostSlices; ++j) {
      const int slice = j * kWarps + threadIdx.x / kWarp, which = slice >= student.slices;
      if (slice < student.slices + teacher.slices && p.features[which].weight_slots) {
        weight_sums.store(j, slice - which * student.slices, p.features[which], blockIdx.x, p.classes);
      }
    }
  }
  terms.finish(blockIdx.x, block.common.scratch[0], block.common.scratch[1], block.common.counts);
}

}  // namespace hetero::cuda
