#include "pixel_losses_kernel.h"

namespace hetero::cpu {
const Kernels<float> kAvx512Kernels = make_kernels<Pair<Vec<16>>>();
}  // namespace hetero::cpu
