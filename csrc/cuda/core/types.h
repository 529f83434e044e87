// Element types that kernels read.
#pragma once

#include "../../arguments.h"

namespace hetero::cuda {

enum class DType : int { kFloat, kBFloat16, kHalf };

}  // namespace hetero::cuda
