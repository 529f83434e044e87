// Products of matrices by the wrappers of mma.cuh, compared with sums of products: 1 for every lane that finds its part right.
#pragma once

#include "../../csrc/cuda/core/mma.cuh"

namespace selftest {

using namespace hetero::cuda;

// Small whole numbers, which halves and tf32 hold exactly.
inline float number(int row, int column) { return static_cast<float>((row * 7 + column * 5) % 11 - 5); }
inline uint16_t as_bfloat16(float x) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16); }

inline bool right(const FragmentC& c, int inner) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  bool all = true;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
    float sum = 1.f;
    for (int k = 0; k < inner; ++k) sum += number(row, k) * number(k, column + 3);
    all = all && c.x[i] == sum;
  }
  return all;
}

// A 16 x 16 and B 16 x 8 in shared memory, read by ldmatrix: A as it lies, B's columns by the transposed one.
inline void products(float* out) {
  const Shared<uint16_t> a(reinterpret_cast<uint16_t*>(dynamic_shared_memory()), 256);
  const Shared<uint16_t> b(reinterpret_cast<uint16_t*>(dynamic_shared_memory()) + 256, 256);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    a.set(i, as_bfloat16(number(i / 16, i % 16)));
    b.set(i, as_bfloat16(i % 16 < 8 ? number(i / 16, i % 16 + 3) : 0.f));
  }
  __syncthreads();
  const int lane = emulation::lane(), t = lane % 4, g = lane / 4;
  const FragmentA left = load_matrices<false>(a, lane % 16 * 16 + lane / 16 * 8);
  const FragmentA both = load_matrices<true>(b, lane % 16 * 16 + lane / 16 * 8);
  FragmentC c{{1.f, 1.f, 1.f, 1.f}};
  multiply_halves<false>(c, left, {{both.x[0], both.x[1]}});
  FragmentC d{{1.f, 1.f, 1.f, 1.f}};
  multiply_tf32(d,
                {{to_tf32(number(g, t)), to_tf32(number(g + 8, t)), to_tf32(number(g, t + 4)), to_tf32(number(g + 8, t + 4))}},
                {{to_tf32(number(t, g + 3)), to_tf32(number(t + 4, g + 3))}});
  write(out + threadIdx.x, right(c, 16) && right(d, 8) ? 1.f : 0.f);
}

// NaN, whatever its payload, and infinity as factors of A (element (g, 2), of B (2, g)) beside ones: every sum that they are
// part of must be like them, the others 8. `Convert`: to tf32; unconverted a payload in the bits that tensor cores ignore is lost.
template <bool Convert>
void special_factors(float* out) {
  const int lane = emulation::lane(), t = lane % 4, g = lane / 4;
  bool all = true;
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7f801fffu, 0x7f802000u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff800000u}) {
    const float special = __builtin_bit_cast(float, bits);
    const auto factor = [&](bool here) {
      return Convert || !here ? to_tf32(here ? special : 1.f) : bits;
    };
    const auto like_it = [&](float x) { return special != special ? x != x : x == special; };
    for (int row = 0; row < 8; ++row) {
      FragmentC a{}, b{};
      multiply_tf32(a, {{factor(t == 2 && g == row), factor(false), factor(false), factor(false)}}, {{factor(false), factor(false)}});
      multiply_tf32(b, {{factor(false), factor(false), factor(false), factor(false)}}, {{factor(t == 2 && g == row), factor(false)}});
      for (int i = 0; i < 4; ++i) {
        all = all && (i < 2 && g == row ? like_it(a.x[i]) : a.x[i] == 8.f);
        all = all && (2 * t + i % 2 == row ? like_it(b.x[i]) : b.x[i] == 8.f);
      }
    }
  }
  write(out + threadIdx.x, __all_sync(0xffffffffu, all) ? 1.f : 0.f);
}

// The nearest number of 11 bits, ties away from zero, of numbers between them and of the largest.
inline void conversions(float* out) {
  bool all = true;
  for (const float sign : {1.f, -1.f}) {
    for (int step = 0; step <= 64; ++step) {
      const double x = 1 + (threadIdx.x * 64 + step) / 65536.0;  // 64 steps from one number of 11 bits to the next
      const float nearest = static_cast<float>(std::floor(x * 1024 + 0.5) / 1024);
      all = all && to_tf32(sign * static_cast<float>(x)) == __builtin_bit_cast(uint32_t, sign * nearest);
    }
    all = all && __builtin_bit_cast(float, to_tf32(sign * 3.4028235e38f)) == sign * INFINITY && to_tf32(sign * 0.f) == (sign < 0 ? 0x80000000u : 0u);
  }
  write(out + threadIdx.x, all ? 1.f : 0.f);
}

}  // namespace selftest
