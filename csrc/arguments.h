// What the losses are told, whichever library computes them.
#pragma once

namespace hetero {

enum class LabelType : int { kInt64, kInt32, kUInt8 };
enum class Reduction : int { kMean, kSum, kNone };

}  // namespace hetero
