#include "projected_losses_kernel.h"

namespace hetero::cpu {
const ProjectedKernels<float> kAvx512ProjectedKernels = make_projected_kernels<Pair<Vec<16>>>();
}  // namespace hetero::cpu
