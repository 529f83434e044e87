// Packing of weights, launched.
#pragma once

#include "../core/launch.cuh"
#include "weights.cuh"

namespace hetero::cuda {

// Where the packed weights are; `p` without a place for them.
inline const uint64_t* pack_weights(WeightPacking p, const Runtime& runtime) {
  const int64_t words = packed_words(p);
  p.packed = static_cast<uint64_t*>(runtime.allocate(words * int64_t(sizeof(uint64_t))));
  launch("pack_weights_kernel", pack_weights_kernel, {(words + kPackThreads - 1) / kPackThreads, kPackThreads, 0}, runtime, p);
  return p.packed;
}

}  // namespace hetero::cuda
