// hakd_loss, from arguments to launches.
#pragma once

#include "call.cuh"
#include "hakd.cuh"

namespace hetero::cuda {

inline void hakd_main(const Call& call, const HakdProblem& p, const Runtime& runtime) {
  const bool proj = p.term[1].weight != 0 && (p.student.gradient || p.teacher.gradient), single = p.lanes == 1;
  const auto run = [&]<bool Default, int Power, bool Proj, bool Single>() {
    launch("hakd_kernel", hakd_kernel<Default, Power, Proj, Single>, call.main_launch(), runtime, p);
  };
  const auto with_power = [&]<int Power>() {
    with_flag(proj, [&]<bool Proj>() { with_flag(single, [&]<bool Single>() { run.template operator()<true, Power, Proj, Single>(); }); });
  };
  // The defaults are compiled for themselves; everything else decides as it goes.
  const bool usual = p.kmm && p.kem == Kem::kClass && !p.cross_entropy;
  if (usual && p.temperature == 1.f) return with_power.template operator()<1>();
  if (usual && p.temperature == 2.f) return with_power.template operator()<2>();
  if (usual && p.temperature == 4.f) return with_power.template operator()<4>();
  with_flag(single, [&]<bool Single>() { run.template operator()<false, 0, true, Single>(); });
}

inline void hakd_launches(const Arguments& arguments, bool kmm, int kem, bool cross_entropy, const Runtime& runtime) {
  Arguments a = arguments;
  if (a.weight[1] == 0) a.teacher.gradient = nullptr;  // L_proj is its only source
  HakdProblem p{};
  p.kem = static_cast<Kem>(kem);
  const bool spatial = p.kem == Kem::kSpatial;
  Call call(a, runtime, p, spatial);
  p.kmm = kmm;
  p.cross_entropy = cross_entropy;
  if (call.plan.blocks > 0) {
    if (spatial) call.set_divisor(0, a.batch * a.classes);
    call.count_divisors(nullptr);
    if (spatial) {
      p.limit = -1.f;
      p.block_scores = call.allocate<float>(call.plan.blocks * 2 * a.classes);
      p.spatial = call.allocate<float>(a.batch * 2 * a.classes);
      HakdProblem scores = p;  // the same pixels, without gradients
      scores.student.gradient = scores.teacher.gradient = nullptr;
      launch("hakd_scores_kernel", hakd_scores_kernel, call.main_launch(), runtime, scores);
      launch("hakd_combine_scores_kernel", hakd_combine_scores_kernel, {a.batch * ((a.classes + 127) / 128), 128, 0}, runtime, p);
    }
    hakd_main(call, p, runtime);
  }
  call.finish();
}

}  // namespace hetero::cuda
