#include "projection_kernel.h"

namespace hetero::cpu {
const ProjectionKernels<float> kAvx512ProjectionKernels = make_projection_kernels<Vec<16>>();
}  // namespace hetero::cpu
