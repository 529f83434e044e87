// Sums and maxima over the lanes of a group, which share a pixel, and over a block.
#pragma once

#include "memory.cuh"
#include "value.cuh"

namespace hetero::cuda {

HK_DEVICE Value shuffled(Value x, int distance) { return Value(__shfl_xor_sync(kAllLanes, x.v, distance)); }

// Every lane of a group of `size` (a power of two up to 32) gets the sum.
HK_DEVICE void add_over_group(Value& x, int size) {
  for (int distance = size / 2; distance > 0; distance /= 2) x = x + shuffled(x, distance);
}

HK_DEVICE void highest_over_group(Value& x, int size) {
  for (int distance = size / 2; distance > 0; distance /= 2) x = maximum(shuffled(x, distance), x);
}

// A class and its logit: the group's highest, the first of several.
struct BestClass {
  Value highest{-INFINITY};
  int number = 0;

  HK_DEVICE void offer(Value z, int c) {
    number = z > highest ? c : number;
    highest = maximum(z, highest);
  }

  HK_DEVICE void over_group(int size) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      const Value z = shuffled(highest, distance);
      const int c = __shfl_xor_sync(kAllLanes, number, distance);
      const bool better = z > highest || (z == highest && c < number);
      number = better ? c : number;
      highest = better ? z : highest;
    }
  }
};

// The sum over a block, for every thread of it, in a fixed order. `scratch` holds 32 values and may be used again after
// the next barrier.
template <class T>
HK_DEVICE T sum_over_block(T x, Shared<T> scratch) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  if (threadIdx.x % kWarp == 0) scratch.set(threadIdx.x / kWarp, x);
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace hetero::cuda
