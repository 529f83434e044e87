// Launching, in CUDA or on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "memory.cuh"
#include "runtime.h"

namespace hetero::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

inline void check_blocks(int64_t blocks) {
  if (blocks >= int64_t(1) << 31) throw std::runtime_error("the loss grid needs " + std::to_string(blocks) + " blocks, at most 2^31");
}

#if defined(HK_EMULATION)

template <class... Parameters, class... Given>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& size, const Runtime&, const Given&... given) {
  check_blocks(size.blocks);
  emulation::run(name, size.blocks, size.threads, size.shared_bytes, [&] { kernel(given...); });
}
inline void clear(void* memory, int64_t bytes, const Runtime&) { emulation::clear(memory, bytes); }

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Never waits for the device, so that calls can be captured in a graph.
template <class... Parameters, class... Given>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& size, const Runtime& runtime, const Given&... given) {
  check_blocks(size.blocks);
  if (size.shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(size.shared_bytes)), name);
  }
  kernel<<<static_cast<unsigned>(size.blocks), size.threads, size.shared_bytes, static_cast<cudaStream_t>(runtime.stream)>>>(given...);
  check(cudaGetLastError(), name);
}
inline void clear(void* memory, int64_t bytes, const Runtime& runtime) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(runtime.stream)), "cudaMemsetAsync");
}

#endif

}  // namespace hetero::cuda
