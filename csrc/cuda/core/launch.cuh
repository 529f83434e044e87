// Launching, in CUDA or on the host.
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "memory.cuh"
#include "runtime.h"

namespace hetero::cuda {

constexpr int64_t kSharedWithoutAsking = 48 << 10;  // dynamic shared memory of a block of any kernel

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

inline void check_blocks(int64_t blocks) {
  if (blocks >= int64_t(1) << 31) throw std::runtime_error("the loss grid needs " + std::to_string(blocks) + " blocks, at most 2^31");
}

#if defined(HK_EMULATION)

template <class Kernel>
void set_shared_limit(const char* name, Kernel* kernel, int device, int64_t bytes) {
  emulation::set_shared_limit(name, reinterpret_cast<const void*>(kernel), device, bytes);
}
template <class... Parameters, class... Given>
void start(const char* name, void (*kernel)(Parameters...), const Launch& size, const Runtime& runtime, const Given&... given) {
  emulation::check_shared_limit(name, reinterpret_cast<const void*>(kernel), runtime.device, size.shared_bytes);
  emulation::run(name, size.blocks, size.threads, size.shared_bytes, [&] { kernel(given...); });
}
inline void clear(void* memory, int64_t bytes, const Runtime&) { emulation::clear(memory, bytes); }

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
template <class Kernel>
void set_shared_limit(const char* name, Kernel* kernel, int /* the current device */, int64_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}
template <class... Parameters, class... Given>
void start(const char* name, void (*kernel)(Parameters...), const Launch& size, const Runtime& runtime, const Given&... given) {
  kernel<<<static_cast<unsigned>(size.blocks), size.threads, size.shared_bytes, static_cast<cudaStream_t>(runtime.stream)>>>(given...);
  check(cudaGetLastError(), name);
}
inline void clear(void* memory, int64_t bytes, const Runtime& runtime) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(runtime.stream)), "cudaMemsetAsync");
}

#endif

// Lets a kernel have all the shared memory that a block of the card can have: once for each function and device, since the
// limit is theirs and not a call's. Set to what a call needs it could be lowered by another thread before the launch.
template <class Kernel>
void lift_shared_limit(const char* name, Kernel* kernel, const Runtime& runtime) {
  static std::mutex mutex;
  static std::set<std::pair<Kernel*, int>> lifted;
  const std::lock_guard<std::mutex> lock(mutex);
  if (lifted.count({kernel, runtime.device})) return;
  set_shared_limit(name, kernel, runtime.device, runtime.card.shared_per_block);
  lifted.insert({kernel, runtime.device});
}

// Never waits for the device, so that calls can be captured in a graph.
template <class... Parameters, class... Given>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& size, const Runtime& runtime, const Given&... given) {
  check_blocks(size.blocks);
  if (size.shared_bytes > kSharedWithoutAsking) lift_shared_limit(name, kernel, runtime);
  start(name, kernel, size, runtime, given...);
}

}  // namespace hetero::cuda
