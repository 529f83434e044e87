// The loss on features, from device pointers to launches. Plain C++: what registrations call.
#pragma once

#include "../pixel_losses/pixel_losses.h"
#include "projected_plan.h"

namespace hetero::cuda {

// `arguments` as for hakd_loss at feature resolution; its networks tell the grid and no more. `kem`: 0 none, 1 class.
void projected_hakd_loss(const Arguments& arguments, const FeatureArguments& student, const FeatureArguments& teacher, bool kmm,
                         int kem, bool cross_entropy, const Runtime& runtime);

ProjectedPlan plan_of(const Arguments& arguments, const FeatureArguments& student, const FeatureArguments& teacher, const Card& card);

}  // namespace hetero::cuda
