#include "projection_kernel.h"

namespace hetero::cpu {
const ProjectionKernels<float> kAvx2ProjectionKernels = make_projection_kernels<Vec<8>>();
}  // namespace hetero::cpu
