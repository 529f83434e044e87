// What lets one source serve the host's vectors and a GPU's threads.
#pragma once

#if defined(__CUDACC__)
#define HK_INLINE __host__ __device__ __forceinline__
#define HK_NOINLINE __noinline__
#else
#define HK_INLINE inline __attribute__((always_inline))
#define HK_NOINLINE __attribute__((noinline))
#define HK_INLINE_LAMBDA __attribute__((always_inline))
#endif
