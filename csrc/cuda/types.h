// Element types that kernels read.
#pragma once

namespace hetero::cuda {

enum class DType : int { kFloat, kBFloat16, kHalf };
enum class LabelType : int { kInt64, kInt32, kUInt8 };

}  // namespace hetero::cuda
