#include "projected_losses_kernel.h"

namespace hetero::cpu {
const ProjectedKernels<float> kPortableProjectedKernels = make_projected_kernels<Pair<Vec<4>>>();
const ProjectedKernels<double> kDoubleProjectedKernels = make_projected_kernels<Lane>();
}  // namespace hetero::cpu
