// Products of matrices by the wrappers of mma.cuh, compared with sums of products: 1 for every lane that finds its part right.
#pragma once

#include "../../csrc/cuda/projection/products.cuh"

namespace selftest {

using namespace hetero::cuda;

// Small whole numbers, which tf32 holds exactly.
inline float number(int row, int column) { return static_cast<float>((row * 7 + column * 5) % 11 - 5); }

inline bool right(const FragmentC& c) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  bool all = true;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
    float sum = 1.f;
    for (int k = 0; k < 8; ++k) sum += number(row, k) * number(k, column + 3);
    all = all && c.x[i] == sum;
  }
  return all;
}

inline void products(float* out) {
  const int lane = emulation::lane(), t = lane % 4, g = lane / 4;
  FragmentC d{{1.f, 1.f, 1.f, 1.f}};
  multiply_tf32(d,
                {{to_tf32(number(g, t)), to_tf32(number(g + 8, t)), to_tf32(number(g, t + 4)), to_tf32(number(g + 8, t + 4))}},
                {{to_tf32(number(t, g + 3)), to_tf32(number(t + 4, g + 3))}});
  write(out + threadIdx.x, right(d) ? 1.f : 0.f);
}

// NaN, whatever its payload, as a factor of A (element (g, 2), of B (2, g)) beside ones: every sum that it is part of must be NaN,
// the others 8. `Split`: in two parts; alone a payload in the bits that tensor cores ignore is lost.
template <bool Split>
void special_factors(float* out) {
  const int lane = emulation::lane(), t = lane % 4, g = lane / 4;
  bool all = true;
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7f801fffu, 0x7f802000u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu}) {
    const float special = __builtin_bit_cast(float, bits);
    const float ones[4] = {1.f, 1.f, 1.f, 1.f};
    for (int row = 0; row < 8; ++row) {
      const float here = t == 2 && g == row ? special : 1.f, factors[4] = {here, 1.f, 1.f, 1.f};
      SplitA left = SplitA::make(factors), one = SplitA::make(ones);
      SplitB right = SplitB::make(here, 1.f), unit = SplitB::make(1.f, 1.f);
      FragmentC a{}, b{};
      add_product(a, left, unit, !Split, true);
      add_product(b, one, right, true, !Split);
      for (int i = 0; i < 4; ++i) {
        all = all && (i < 2 && g == row ? a.x[i] != a.x[i] : a.x[i] == 8.f);
        all = all && (2 * t + i % 2 == row ? b.x[i] != b.x[i] : b.x[i] == 8.f);
      }
    }
  }
  write(out + threadIdx.x, __all_sync(0xffffffffu, all) ? 1.f : 0.f);
}

// The nearest number of 11 bits, ties away from zero, of numbers between them and of the largest; and a number's two parts as
// tensor cores take them, which are together it to 23 bits.
inline void conversions(float* out) {
  bool all = true;
  for (const float sign : {1.f, -1.f}) {
    for (int step = 0; step <= 64; ++step) {
      const double x = 1 + (threadIdx.x * 64 + step) / 65536.0;  // 64 steps from one number of 11 bits to the next
      const float nearest = static_cast<float>(std::floor(x * 1024 + 0.5) / 1024);
      all = all && to_tf32(sign * static_cast<float>(x)) == __builtin_bit_cast(uint32_t, sign * nearest);
    }
    all = all && __builtin_bit_cast(float, to_tf32(sign * 3.4028235e38f)) == sign * INFINITY && to_tf32(sign * 0.f) == (sign < 0 ? 0x80000000u : 0u);
    for (int step = 0; step < 4096; ++step) {
      const float x = sign * static_cast<float>(std::exp2((threadIdx.x * 4096 + step) / 262144.0));
      uint32_t big, small;
      split(x, big, small);
      const double parts = double(__builtin_bit_cast(float, big)) + __builtin_bit_cast(float, small & kTf32Bits);
      all = all && std::fabs(parts / x - 1) <= 0x1p-23;
    }
  }
  write(out + threadIdx.x, all ? 1.f : 0.f);
}

}  // namespace selftest
