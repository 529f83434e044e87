// projected_hakd_loss and project_back, from arguments to launches.
#pragma once

#include "../pixel_losses/call.cuh"
#include "projected_losses_back.cuh"
#include "projected_losses_weights.cuh"

namespace hetero::cuda {

inline FeatureNetwork describe(const FeatureArguments& f, int64_t batch, int64_t height, int64_t width) {
  FeatureNetwork out{};
  out.data = f.data;
  out.dtype = f.dtype;
  for (int i = 0; i < 4; ++i) out.stride[i] = f.stride[i];
  if (width == 1) out.stride[3] = out.stride[2];  // the next pixel is in the next row
  out.channels = f.channels;
  out.slices = slices_of(f.channels);
  out.flat = height == 1 || width == 1 || f.stride[2] == width * f.stride[3];
  out.pixel_major = f.stride[1] == 1 && out.stride[3] != 1 && f.channels > 1;
  const int run = f.dtype == DType::kFloat ? 4 : 8;
  const auto multiple = [&](int64_t stride, int64_t size) { return size <= 1 || stride % run == 0; };
  out.aligned = reinterpret_cast<uintptr_t>(f.data) % 16 == 0 && multiple(f.stride[0], batch);
  if (out.pixel_major) {
    out.aligned = out.aligned && multiple(f.stride[3], width) && multiple(f.stride[2], height);
  } else {
    out.aligned = out.aligned && out.flat && (out.stride[3] == 1 || height * width == 1) && multiple(f.stride[1], f.channels);
  }
  out.weight = f.weight;
  out.bias = f.bias;
  out.logit_gradient = f.logit_gradient;
  return out;
}

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

inline void project_back_launch(const BackArguments& a, const Runtime& runtime) {
  BackProblem p{a, (a.pixels + kBackPixels - 1) / kBackPixels, 0};
  p.tiles = a.batch * p.tiles_of_image;
  if (p.tiles == 0 || a.channels == 0) return;
  const int64_t blocks = p.tiles < 2 * runtime.card.multiprocessors ? p.tiles : 2 * runtime.card.multiprocessors;
  const int64_t shared = array_bytes(8 * class_tiles_of(a.classes) * back_pitch(kBackPixels), 4);
  launch("project_back_kernel", project_back_kernel, {blocks, kFeatureThreads, shared}, runtime, p);
}

}  // namespace hetero::cuda
