// Tensor cores: products of 16 x 16 (16 x 8) and 16 x 8 (8 x 8) matrices that a warp holds in pieces, added up in float32.
// Lane l = 4 g + t has, of a fragment's 32-bit registers (PTX ISA, mma.m16n8k16 and mma.m16n8k8):
//   A, 16 x k, row-major, halves: rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1, the last two 8 further on;
//   B, k x 8, column-major, halves: column g; rows 2 t and 2 t + 1, the second 8 further on;
//   tf32: A rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4; B column g, rows t and t + 4;
//   C, 16 x 8, floats: rows g, g, g + 8, g + 8; columns 2 t and 2 t + 1.
#pragma once

#include "memory.cuh"

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
constexpr float kMostTf32 = 0x1.ffep127f;   // this and what is larger would round to infinity

// A float that they cut down to the nearest with tf32's 10 bits of mantissa, ties away from zero; of a NaN it makes anything.
HK_DEVICE uint32_t round_for_tf32(float x) { return __builtin_bit_cast(uint32_t, x) + 0x1000u; }

// That nearest float itself. A NaN stays one: cvt.rna.tf32.f32 only cuts it, and where no upper bit is set that is infinity.
HK_DEVICE uint32_t to_tf32(float x) { return x == x ? round_for_tf32(x) & kTf32Bits : 0x7fffe000u; }

#if defined(HK_EMULATION)

namespace host {

// As tensor cores round their sums.
inline float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.f) : nearest;
}

// Element (row, column) of C += A B for a warp's fragments.
template <int K, class ElementA, class ElementB>
void multiply(FragmentC& c, const FragmentA& a, const FragmentB& b, ElementA element_a, ElementB element_b) {
  struct Operands {
    const FragmentA* a;
    const FragmentB* b;
  };
  const Operands mine{&a, &b};
  const uint64_t* all = emulation::gather(reinterpret_cast<uint64_t>(&mine));
  const auto lane_of = [&](int lane) { return reinterpret_cast<const Operands*>(all[lane]); };
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
    double sum = c.x[i];
    for (int k = 0; k < K; ++k) {
      sum += double(element_a([&](int lane) -> const FragmentA& { return *lane_of(lane)->a; }, row, k)) *
             element_b([&](int lane) -> const FragmentB& { return *lane_of(lane)->b; }, k, column);
    }
    c.x[i] = towards_zero(sum);
  }
  emulation::hold();
}

template <bool Half>
float half_of(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
  return Half ? half_to_float(bits) : __builtin_bit_cast(float, uint32_t(bits) << 16);
}

}  // namespace host

#endif

// C += A B of halves: float16 (`Half`) or bfloat16.
template <bool Half>
HK_DEVICE void multiply_halves(FragmentC& c, const FragmentA& a, const FragmentB& b) {
#if defined(HK_EMULATION)
  host::multiply<16>(
      c, a, b,
      [](const auto& fragment, int row, int k) {
        return host::half_of<Half>(fragment(row % 8 * 4 + k % 8 / 2).x[row / 8 + k / 8 * 2], k % 2);
      },
      [](const auto& fragment, int k, int column) {
        return host::half_of<Half>(fragment(column * 4 + k % 8 / 2).x[k / 8], k % 2);
      });
#else
#define HK_MMA_HALVES(type)                                                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "      \
               "{%0,%1,%2,%3};"                                                                                           \
               : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])                                                   \
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]))
  if constexpr (Half) {
    HK_MMA_HALVES("f16");
  } else {
    HK_MMA_HALVES("bf16");
  }
#undef HK_MMA_HALVES
#endif
}

// C += A B of tf32 numbers (`to_tf32`); k = 8.
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

// Four 8 x 8 matrices of halves from shared memory: lane l names row l % 8 of matrix l / 8, 8 halves from `at` on (a multiple
// of 8). Register j of lane 4 g + t becomes elements 2 t and 2 t + 1 of row g of matrix j; `Transposed`: of column g.
template <bool Transposed>
HK_DEVICE FragmentA load_matrices(const Shared<uint16_t>& from, int at) {
  FragmentA out;
#if defined(HK_EMULATION)
  uint16_t mine[8];
  for (int i = 0; i < 8; ++i) mine[i] = from[at + i];
  const uint64_t* all = emulation::gather(reinterpret_cast<uint64_t>(mine));
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int j = 0; j < 4; ++j) {
    uint32_t halves[2];
    for (int i = 0; i < 2; ++i) {
      const int row = Transposed ? 2 * t + i : g, column = Transposed ? g : 2 * t + i;
      halves[i] = reinterpret_cast<const uint16_t*>(all[8 * j + row])[column];
    }
    out.x[j] = halves[0] | halves[1] << 16;
  }
  emulation::hold();
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from.address(at)));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x[0]), "=r"(out.x[1]), "=r"(out.x[2]), "=r"(out.x[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x[0]), "=r"(out.x[1]), "=r"(out.x[2]), "=r"(out.x[3]) : "r"(address) : "memory");
  }
#endif
  return out;
}

}  // namespace hetero::cuda
