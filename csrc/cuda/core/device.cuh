// What kernels are written in: CUDA, or a header that stands in for it and runs them on the host (tests/emulation).
#pragma once

#if defined(HK_EMULATION)
#include HK_EMULATION
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "../../pixel/macros.h"

// Kernels that are no templates are defined in headers: each translation unit has its own.
#define HK_KERNEL static __global__
#define HK_DEVICE __device__ __forceinline__
// Accesses to memory, which the emulation tells apart by the place that they are inlined in.
#if defined(HK_EMULATION)
#define HK_ACCESS inline __attribute__((always_inline))
#else
#define HK_ACCESS HK_DEVICE
#endif

namespace hetero::cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

}  // namespace hetero::cuda
