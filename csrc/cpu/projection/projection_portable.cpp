#include "projection_kernel.h"

namespace hetero::cpu {
const ProjectionKernels<float> kPortableProjectionKernels = make_projection_kernels<Vec<4>>();
const ProjectionKernels<double> kDoubleProjectionKernels = make_projection_kernels<Lane>();
}  // namespace hetero::cpu
