// projected_hakd_loss, from arguments to launches.
#pragma once

#include "../pixel_losses/call.cuh"
#include "../projection/weights_launch.cuh"
#include "projected_losses_weights.cuh"

namespace hetero::cuda {

inline void projected_main(const ProjectedPlan& plan, const ProjectedProblem& p, const Runtime& runtime) {
  const auto run = [&]<int RowTiles, int ClassTiles, bool OnChip, bool Resident>() {
    launch("projected_hakd_kernel", projected_hakd_kernel<ProjectedShape<RowTiles, ClassTiles, OnChip, Resident>>,
           {plan.blocks, plan.threads, plan.shared_bytes}, runtime, p);
  };
  if (plan.resident) return run.template operator()<2, kFewClassTiles, true, true>();
  if (plan.on_chip) return run.template operator()<1, kFewClassTiles, true, false>();
  if (plan.class_tiles == kFewClassTiles) return run.template operator()<2, kFewClassTiles, false, false>();
  if (plan.class_tiles == kManyClassTiles) return run.template operator()<2, kManyClassTiles, false, false>();
  run.template operator()<1, kMostClassTiles, false, false>();
}

inline void weight_gradients(const ProjectedPlan& plan, const WeightsProblem& p, const Runtime& runtime) {
  const auto run = [&]<int ClassTiles, int Pixels>() {
    launch("weight_gradients_kernel", weight_gradients_kernel<kWeightTiles / ClassTiles, ClassTiles, Pixels>,
           {int64_t(p.columns[0] + p.columns[1]) * p.splits, plan.threads, plan.weight_shared_bytes}, runtime, p);
  };
  if (plan.class_tiles == kFewClassTiles) return run.template operator()<kFewClassTiles, 32>();
  if (plan.class_tiles == kManyClassTiles) return run.template operator()<kManyClassTiles, 32>();
  run.template operator()<kMostClassTiles, 16>();
}

inline void projected_launches(const Arguments& a, FeatureArguments student, FeatureArguments teacher, bool kmm, int kem,
                               bool cross_entropy, const Runtime& runtime) {
  const int64_t height = a.student.height, width = a.student.width, pixels = height * width;
  ProjectedPlan plan = plan_of(a, student, teacher, runtime.card);
  if (a.weight[1] == 0) teacher.logit_gradient = teacher.weight_gradient = teacher.bias_gradient = nullptr;  // L_proj is its only source
  ProjectedProblem p{};
  LossCall call(a, runtime, p, AxisTiles{height, 1, 0, 1}, AxisTiles{width, 1, 0, 1}, plan.blocks);
  p.kmm = kmm;
  p.kem = static_cast<Kem>(kem);
  p.cross_entropy = cross_entropy;
  check_blocks(plan.tiles);
  p.grid = {(pixels + plan.pixels - 1) / plan.pixels, pixels, width, static_cast<int>(plan.tiles), plan.slots};
  const FeatureArguments* given[2] = {&student, &teacher};
  WeightsProblem w{};
  ProjectedFinish f{};
  f.parts = plan.blocks;
  f.weight_slots = plan.on_chip ? plan.blocks : plan.splits;
  bool gradients = false, weights = false;
  for (int i = 0; i < 2; ++i) {
    const FeatureArguments& g = *given[i];
    FeatureNetwork& n = p.features[i] = describe(g, a.batch, height, width);
    gradients = gradients || g.logit_gradient || g.weight_gradient;
    f.weight[i] = g.weight_gradient;
    f.bias[i] = g.bias_gradient;
    if (g.bias_gradient) n.bias_slots = call.allocate<float>(plan.blocks * a.classes);
    if (!g.weight_gradient) continue;
    weights = true;
    n.weight_slots = call.allocate<float>(f.weight_slots * a.classes * g.channels);
    f.blocks[i] = (a.classes * g.channels + kFinishParts - 1) / kFinishParts;
    w.columns[i] = plan.columns[i];
    if (!plan.on_chip && !n.logit_gradient) n.logit_gradient = call.allocate<float>(a.batch * a.classes * pixels);
    w.gradient[i] = n.logit_gradient;
  }
  if (plan.blocks > 0) {
    call.count_divisors(nullptr, gradients);
    if (!plan.on_chip && weights) p.valid = call.allocate<unsigned>(plan.tiles);
    if (!plan.resident) {
      const int class_tiles = whole_class_tiles(a.classes, plan.class_tiles);
      p.packed = pack_weights({{p.features[0], p.features[1]}, p.classes, class_tiles, nullptr}, runtime);
    }
    projected_main(plan, p, runtime);
    if (!plan.on_chip && weights) {
      for (int i = 0; i < 2; ++i) w.features[i] = p.features[i];
      w.grid = p.grid;
      w.grid.slots = plan.weight_slots;
      w.classes = static_cast<int>(a.classes);
      w.splits = plan.splits;
      w.valid = p.valid;
      weight_gradients(plan, w, runtime);
    }
  } else {
    f.weight_slots = 0;  // sums of nothing
  }
  launch("finish_projected_kernel", finish_projected_kernel, {f.blocks[0] + f.blocks[1] + 1, kFinishParts, kFinishSharedBytes}, runtime,
         p, f);
}

}  // namespace hetero::cuda
