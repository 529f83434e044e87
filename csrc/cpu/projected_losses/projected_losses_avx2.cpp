#include "projected_losses_kernel.h"

namespace hetero::cpu {
const ProjectedKernels<float> kAvx2ProjectedKernels = make_projected_kernels<Pair<Vec<8>>>();
}  // namespace hetero::cpu
