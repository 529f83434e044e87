// segmentation_loss, from arguments to launches.
#pragma once

#include "call.cuh"
#include "segmentation.cuh"

namespace hetero::cuda {

inline void segmentation_main(const Call& call, const SegmentationProblem& p, bool teacher, const Runtime& runtime) {
  const bool smooth = p.smoothing != 0, single = p.lanes == 1;
  with_flag(single, [&]<bool Single>() {
    const auto run = [&]<bool Teacher, int Power, bool Smooth>() {
      launch("segmentation_kernel", segmentation_kernel<Teacher, Power, Smooth, Single>, call.main_launch(), runtime, p);
    };
    if (!teacher) return with_flag(smooth, [&]<bool Smooth>() { run.template operator()<false, 1, Smooth>(); });
    if (smooth) return run.template operator()<true, 0, true>();
    if (p.temperature == 1.f) return run.template operator()<true, 1, false>();
    run.template operator()<true, 0, false>();
  });
}

inline void segmentation_launches(const Arguments& arguments, const float* class_weight, double label_smoothing,
                                  const Runtime& runtime) {
  Arguments a = arguments;
  if (!a.has_teacher) {
    a.temperature = 1.0;  // nothing else looks at it
    a.weight[1] = 0.0;
  }
  SegmentationProblem p{};
  Call call(a, runtime, p);
  p.smoothing = static_cast<float>(label_smoothing);
  p.class_weight = class_weight;
  if (call.plan.blocks > 0) {
    call.count_divisors(class_weight);
    segmentation_main(call, p, a.has_teacher, runtime);
  }
  call.finish();
}

}  // namespace hetero::cuda
