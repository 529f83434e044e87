// Stands in for CUDA's built-ins, so that g++ compiles unchanged kernels: a fiber for each thread of a block, blocks one
// after the other. emulation.h runs them and watches what they do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static  // static arrays: blocks run one at a time
#define __restrict__

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

inline void __syncthreads() { ::emulation::barrier(0); }
inline int __syncthreads_or(int x) { return ::emulation::barrier(x != 0) > 0; }
inline int __syncthreads_count(int x) { return ::emulation::barrier(x != 0); }
inline int __syncthreads_and(int x) { return ::emulation::barrier(x == 0) == 0; }

namespace emulation {

template <class T>
T exchange(Collective kind, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(kind, mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(thread_index().x % 32); }

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = ::emulation::lane();
  return ::emulation::exchange(::emulation::Collective::kShuffle, mask, value, lane / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = ::emulation::lane(), from = lane ^ distance;
  return ::emulation::exchange(::emulation::Collective::kShuffle, mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = ::emulation::lane(), from = lane + distance;
  return ::emulation::exchange(::emulation::Collective::kShuffle, mask, value, from / width != lane / width ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = ::emulation::lane(), from = lane % width - distance;
  return ::emulation::exchange(::emulation::Collective::kShuffle, mask, value, from < 0 ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return static_cast<unsigned>(::emulation::collective(::emulation::Collective::kBallot, mask, x != 0, 0));
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == mask; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulation::collective(::emulation::Collective::kSyncWarp, mask, 0, 0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// One thread at a time runs: an addition is atomic as it is.
template <class T>
T atomicAdd(T* p, T x) {
  ::emulation::observe_atomic(p, sizeof(T));
  const T old = *p;
  *p = old + x;
  return old;
}
