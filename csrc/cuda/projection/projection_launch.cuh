// The functions of projection.h, from arguments to launches.
#pragma once

#include <algorithm>

#include "../core/launch.cuh"
#include "projection_back.cuh"
#include "projection_weights.cuh"
#include "weights_launch.cuh"

namespace hetero::cuda {

inline FeatureGrid grid_of(const ProjectionArguments& a, int pixels_of_tile, int64_t tiles, int slots) {
  const int64_t pixels = a.height * a.width;
  check_blocks(tiles);
  return {(pixels + pixels_of_tile - 1) / pixels_of_tile, pixels, a.width, static_cast<int>(tiles), slots};
}

inline void project_launches(const ProjectionArguments& a, float* logits, float* pilot, double* statistics, const Runtime& runtime) {
  const ProjectionPlan plan = plan_of(a, runtime.card);
  if (plan.tiles == 0) return;
  ProjectionProblem p{};
  p.features = describe(a.features, a.batch, a.height, a.width);
  p.grid = grid_of(a, plan.pixels, plan.tiles, plan.slots);
  p.rounding = a.rounding;
  p.batch = a.batch;
  p.classes = static_cast<int>(a.classes);
  p.chunks = plan.chunks;
  p.groups = plan.groups;
  p.logits = logits;
  if (statistics) {
    p.pilot = pilot;
    p.parts = static_cast<float*>(runtime.allocate(2 * a.classes * plan.tiles * int64_t(sizeof(float))));
    const int64_t channels = kPilotThreads / kPilotRun;
    launch("pilot_kernel", pilot_kernel, {(a.features.channels + channels - 1) / channels, kPilotThreads, 0}, runtime, p);
  }
  p.packed = pack_weights({{p.features, {}}, p.classes, class_tiles_of(a.classes), nullptr}, runtime);
  const auto run = [&]<int RowTiles, int ClassTiles>() {
    launch("project_kernel", project_kernel<RowTiles, ClassTiles>, {plan.blocks, kFeatureThreads, plan.shared_bytes}, runtime, p);
  };
  if (plan.class_tiles == kFewClassTiles) {
    run.template operator()<2, kFewClassTiles>();
  } else if (plan.class_tiles == kManyClassTiles) {
    run.template operator()<2, kManyClassTiles>();
  } else if (plan.class_tiles == kMoreClassTiles) {
    run.template operator()<2, kMoreClassTiles>();
  } else {
    run.template operator()<1, kMostClassTiles>();
  }
  if (!statistics) return;
  const int64_t shared = 3 * array_bytes(kStatisticsThreads / kWarp, 8);
  const double inverse = 1.0 / static_cast<double>(a.batch * a.height * a.width);
  launch("statistics_kernel", statistics_kernel, {a.classes, kStatisticsThreads, shared}, runtime, p, plan.pixels, inverse, statistics);
}

inline void project_weights_launches(const ProjectionArguments& a, const LogitGradient& gradient, const float* pilot, float* out,
                                     const Runtime& runtime) {
  const ProjectionPlan plan = plan_of(a, runtime.card);
  ProjectionWeightsProblem p{};
  p.features = describe(a.features, a.batch, a.height, a.width);
  p.grid = grid_of(a, plan.weight_pixels, plan.weight_tiles, plan.weight_slots);
  p.rounding = a.rounding;
  p.classes = static_cast<int>(a.classes);
  p.columns = plan.columns;
  p.chunks = plan.chunks;
  p.splits = plan.weight_tiles > 0 ? plan.splits : 0;  // sums of nothing
  p.pilot = pilot;
  p.gradient = gradient;
  const int64_t size = a.classes * a.features.channels;
  if (p.splits > 0) {
    p.features.weight_slots = static_cast<float*>(runtime.allocate(p.splits * size * int64_t(sizeof(float))));
    const auto run = [&]<int ClassTiles, int Pixels>() {
      launch("projection_weights_kernel", projection_weights_kernel<slices_of_warp(ClassTiles), ClassTiles, Pixels>,
             {int64_t(plan.columns) * plan.chunks * p.splits, kFeatureThreads, plan.weight_shared_bytes}, runtime, p);
    };
    if (plan.class_tiles == kFewClassTiles) {
      run.template operator()<kFewClassTiles, 32>();
    } else if (plan.class_tiles == kManyClassTiles) {
      run.template operator()<kManyClassTiles, 32>();
    } else if (plan.class_tiles == kMoreClassTiles) {
      run.template operator()<kMoreClassTiles, 16>();
    } else {
      run.template operator()<kMostClassTiles, 16>();
    }
  }
  launch("finish_weights_kernel", finish_weights_kernel, {(size + kFinishWeights - 1) / kFinishWeights, kFinishWeights, 0}, runtime, p, out);
}

inline void project_back_launch(const BackArguments& a, const Runtime& runtime) {
  BackProblem p{a, (a.pixels + kBackPixels - 1) / kBackPixels, 0};
  p.tiles = a.batch * p.tiles_of_image;
  if (p.tiles == 0 || a.channels == 0) return;
  const int64_t blocks = std::min<int64_t>(p.tiles, 2 * runtime.card.multiprocessors);
  const int64_t rows = 8 * class_tiles_of(std::min<int64_t>(a.classes, kMostFeatureClasses));
  const int64_t shared = array_bytes(rows * kBackPixels, 8) + array_bytes(3 * rows, 4);
  launch("project_back_kernel", project_back_kernel, {blocks, kFeatureThreads, shared}, runtime, p);
}

}  // namespace hetero::cuda
