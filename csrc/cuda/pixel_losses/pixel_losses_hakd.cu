// hakd_loss of pixel_losses.h.
#include "hakd_launch.cuh"

namespace hetero::cuda {

void hakd_loss(const Arguments& arguments, bool kmm, int kem, bool cross_entropy, const Runtime& runtime) {
  hakd_launches(arguments, kmm, kem, cross_entropy, runtime);
}

}  // namespace hetero::cuda
