#include "pixel_losses_kernel.h"

namespace hetero::cpu {
const Kernels<float> kPortableKernels = make_kernels<Pair<Vec<4>>>();
const Kernels<double> kDoubleKernels = make_kernels<Lane>();
}  // namespace hetero::cpu
