// What lets one source serve the host's vectors and a GPU's threads.
#pragma once

#if defined(__CUDACC__)
#define HK_INLINE __host__ __device__ __forceinline__
#else
#define HK_INLINE inline __attribute__((always_inline))
#endif
