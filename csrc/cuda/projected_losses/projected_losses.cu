// The function of projected_losses.h.
#include "projected_losses_launch.cuh"

namespace hetero::cuda {

void projected_hakd_loss(const Arguments& arguments, const FeatureArguments& student, const FeatureArguments& teacher, bool kmm,
                         int kem, bool cross_entropy, const Runtime& runtime) {
  projected_launches(arguments, student, teacher, kmm, kem, cross_entropy, runtime);
}

}  // namespace hetero::cuda
