// Tensor cores: products of 16 x 8 and 8 x 8 matrices that a warp holds in pieces, added up in float32. Lane l = 4 g + t has,
// of a fragment's 32-bit registers (PTX ISA, mma.m16n8k8):
//   A, 16 x 8, row-major: rows g, g + 8, g, g + 8; columns t, t, t + 4, t + 4;
//   B, 8 x 8, column-major: column g; rows t and t + 4;
//   C, 16 x 8: rows g, g, g + 8, g + 8; columns 2 t and 2 t + 1.
#pragma once

#include "device.cuh"

namespace hetero::cuda {

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[2];
};
struct FragmentC {
  float x[4];
};

constexpr uint32_t kTf32Bits = 0xffffe000u;  // of a float: tensor cores cut off the others
constexpr float kMostTf32 = 0x1.ffep127f;    // this and what is larger rounds to infinity

// The nearest float with tf32's 10 bits of mantissa, ties away from zero. Of a NaN it may make a number, or infinity.
HK_DEVICE uint32_t to_tf32(float x) { return (__builtin_bit_cast(uint32_t, x) + 0x1000u) & kTf32Bits; }

#if defined(HK_EMULATION)

namespace host {

// As tensor cores round their sums: the double's bits beyond a float's are cut off.
inline float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (!(std::fabs(double(nearest)) > std::fabs(x))) return nearest;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, nearest) - 1);  // its neighbour below, of either sign
}

// Rows g and g + 8 of C += A B for a warp's fragments, columns 2 t and 2 t + 1. `element_a(fragments of the lanes, row, k)` and
// `element_b(..., k, column)` are the factors' elements.
template <int K, class ElementA, class ElementB>
void multiply(FragmentC& c, const FragmentA& a, const FragmentB& b, ElementA element_a, ElementB element_b) {
  struct Operands {
    const FragmentA* a;
    const FragmentB* b;
  };
  const Operands mine{&a, &b};
  const uint64_t* all = emulation::gather(reinterpret_cast<uint64_t>(&mine));
  const auto lane_of = [&](int lane) { return reinterpret_cast<const Operands*>(all[lane]); };
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  double sums[4] = {c.x[0], c.x[1], c.x[2], c.x[3]};
  for (int k = 0; k < K; ++k) {
    double rows[2], columns[2];
    for (int i = 0; i < 2; ++i) {
      rows[i] = element_a([&](int of) -> const FragmentA& { return *lane_of(of)->a; }, g + 8 * i, k);
      columns[i] = element_b([&](int of) -> const FragmentB& { return *lane_of(of)->b; }, k, 2 * t + i);
    }
    for (int i = 0; i < 4; ++i) sums[i] += rows[i / 2] * columns[i % 2];
  }
  for (int i = 0; i < 4; ++i) c.x[i] = towards_zero(sums[i]);
  emulation::hold();
}

}  // namespace host

#endif

// C += A B of tf32 numbers (`to_tf32`), or of what their bits make of other floats; k = 8.
HK_DEVICE void multiply_tf32(FragmentC& c, const FragmentA& a, const FragmentB& b) {
#if defined(HK_EMULATION)
  host::multiply<8>(
      c, a, b,
      [](const auto& fragment, int row, int k) {
        return __builtin_bit_cast(float, fragment(row % 8 * 4 + k % 4).x[row / 8 + k / 4 * 2] & kTf32Bits);
      },
      [](const auto& fragment, int k, int column) {
        return __builtin_bit_cast(float, fragment(column * 4 + k % 4).x[k / 4] & kTf32Bits);
      });
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
#endif
}

// A B alone.
HK_DEVICE FragmentC product_tf32(const FragmentA& a, const FragmentB& b) {
  FragmentC c{{0.f, 0.f, 0.f, 0.f}};
#if defined(HK_EMULATION)
  multiply_tf32(c, a, b);
#else
  // C is no register here, which would have to be made 0.
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(c.x[0]), "=f"(c.x[1]), "=f"(c.x[2]), "=f"(c.x[3])
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]), "f"(0.f));
#endif
  return c;
}

}  // namespace hetero::cuda
