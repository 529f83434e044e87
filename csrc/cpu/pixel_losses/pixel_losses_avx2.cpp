#include "pixel_losses_kernel.h"

namespace hetero::cpu {
const Kernels<float> kAvx2Kernels = make_kernels<Pair<Vec<8>>>();
}  // namespace hetero::cpu
