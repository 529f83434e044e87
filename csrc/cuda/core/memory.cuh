// Memory as kernels see it: shared memory through views, global memory through `read` and `write`. On a GPU they are
// plain accesses; on the host an observer sees each one, and reports races and what is out of bounds.
#pragma once

#include "device.cuh"
#include "types.h"

namespace hetero::cuda {

template <class T>
HK_ACCESS T read(const T* p) {
#if defined(HK_EMULATION)
  emulation::observe_global(p, sizeof(T), false);
  return *p;
#else
  return __ldg(p);
#endif
}

// Of what the same launch may have written.
template <class T>
HK_ACCESS T read_back(const T* p) {
#if defined(HK_EMULATION)
  emulation::observe_global(p, sizeof(T), false);
#endif
  return *p;
}

template <class T>
HK_ACCESS void write(T* p, T value) {
#if defined(HK_EMULATION)
  emulation::observe_global(p, sizeof(T), true);
#endif
  *p = value;
}

// 16 bytes, and elements of them that the compiler knows the places of.
struct alignas(16) Wide {
  uint32_t word[4];

  template <class T>
  HK_DEVICE T element(int i) const {
    if constexpr (sizeof(T) == 8) return static_cast<T>(uint64_t(word[2 * i + 1]) << 32 | word[2 * i]);
    constexpr int kInWord = 4 / int(sizeof(T)) > 0 ? 4 / int(sizeof(T)) : 1;
    return static_cast<T>(word[i / kInWord] >> 8 * int(sizeof(T)) * (i % kInWord));
  }
};

// By one load, from a multiple of 16 bytes.
HK_ACCESS Wide read_wide(const void* p) {
#if defined(HK_EMULATION)
  return read(static_cast<const Wide*>(p));
#else
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#endif
}

HK_DEVICE float half_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  // The exponent moved to float's place is off by a factor of 2^112; subnormals come right by it too.
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf, NaN
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | sign | special);
#endif
}

// Of what was read: a float, or the bits of one of `type`.
HK_DEVICE float to_float(float x, DType) { return x; }
HK_DEVICE float to_float(uint16_t bits, DType type) {
  return type == DType::kHalf ? half_to_float(bits) : __builtin_bit_cast(float, uint32_t(bits) << 16);
}

HK_DEVICE float read_float(const void* data, DType type, int64_t index) {
  if (type == DType::kFloat) return read(static_cast<const float*>(data) + index);
  return to_float(read(static_cast<const uint16_t*>(data) + index), type);
}

HK_DEVICE uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#elif defined(__CUDACC__)
  return 0;  // no kernel runs here
#else
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
#endif
}

// To the nearest, ties to even.
HK_DEVICE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // a NaN stays one
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

HK_DEVICE void write_float(void* data, DType type, int64_t index, float x) {
  if (type == DType::kFloat) return write(static_cast<float*>(data) + index, x);
  write(static_cast<uint16_t*>(data) + index, type == DType::kHalf ? float_to_half(x) : float_to_bfloat16(x));
}

// Two neighbours by one store, from a multiple of both's bytes on.
HK_DEVICE void write_floats(void* data, DType type, int64_t index, float x, float y) {
  struct alignas(8) Floats {
    float x, y;
  };
  if (type == DType::kFloat) return write(reinterpret_cast<Floats*>(static_cast<float*>(data) + index), Floats{x, y});
  const bool half = type == DType::kHalf;
  const uint32_t low = half ? float_to_half(x) : float_to_bfloat16(x), high = half ? float_to_half(y) : float_to_bfloat16(y);
  write(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(data) + index), high << 16 | low);
}

HK_DEVICE int64_t read_label(const void* data, LabelType type, int64_t index) {
  if (type == LabelType::kInt64) return read(static_cast<const int64_t*>(data) + index);
  if (type == LabelType::kInt32) return read(static_cast<const int32_t*>(data) + index);
  return read(static_cast<const uint8_t*>(data) + index);
}

// An array in shared memory.
template <class T>
class Shared {
 public:
  Shared() = default;
  HK_DEVICE explicit Shared(T* data, int count) : data_(data) {
#if defined(HK_EMULATION)
    count_ = count;
#else
    (void)count;
#endif
  }

  HK_ACCESS T operator[](int i) const {
    observe(i, false);
    return data_[i];
  }
  HK_ACCESS void set(int i, T value) const {
    observe(i, true);
    data_[i] = value;
  }
  // For the instructions of async.cuh, which access memory themselves.
  HK_DEVICE T* address(int i) const {
#if defined(HK_EMULATION)
    emulation::check_index(count_, i);
#endif
    return data_ + i;
  }

 private:
  HK_ACCESS void observe(int i, bool writes) const {
#if defined(HK_EMULATION)
    emulation::observe_shared(data_, count_, i, sizeof(T), writes);
#else
    (void)i;
    (void)writes;
#endif
  }

  T* data_ = nullptr;
#if defined(HK_EMULATION)
  int count_ = 0;
#endif
};

// Cuts a block's dynamic shared memory into arrays; without memory it only counts the bytes (plan.cpp counts with it).
class SharedAllocator {
 public:
  HK_INLINE explicit SharedAllocator(unsigned char* memory) : memory_(memory) {}

  template <class T>
  HK_DEVICE Shared<T> take(int count) {
    unsigned char* at = memory_ + used_;
    used_ += (count * int(sizeof(T)) + 15) / 16 * 16;
    return Shared<T>(reinterpret_cast<T*>(at), count);
  }

 private:
  unsigned char* memory_;
  int used_ = 0;
};

#if !defined(HK_EMULATION)
HK_DEVICE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
inline unsigned char* dynamic_shared_memory() { return emulation::dynamic_shared_memory(); }
#endif

}  // namespace hetero::cuda
