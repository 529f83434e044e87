// Products of float32 matrices by tensor cores, whose factors have 11 bits.
#pragma once

#include "../core/memory.cuh"
#include "../core/mma.cuh"

namespace hetero::cuda {

// A factor as two numbers of a tensor core's 11 bits, whose sum is x to 23 bits: the second has 12, of either sign, of which the
// tensor core cuts off the last. It is NaN where x is NaN or infinite, whatever the first is then.
HK_DEVICE void split(float x, uint32_t& big, uint32_t& small) {
  big = to_tf32(x);
  small = __builtin_bit_cast(uint32_t, x - __builtin_bit_cast(float, big));
}

struct SplitA {
  FragmentA big, small;

  HK_DEVICE static SplitA make(const float* x) {
    SplitA out;
#pragma unroll
    for (int j = 0; j < 4; ++j) split(x[j], out.big.x[j], out.small.x[j]);
    return out;
  }
};

struct SplitB {
  FragmentB big, small;

  HK_DEVICE static SplitB make(float x, float y) {
    SplitB out;
    split(x, out.big.x[0], out.small.x[0]);
    split(y, out.big.x[1], out.small.x[1]);
    return out;
  }

  // As one access of 16 bytes has it.
  HK_DEVICE static SplitB of(const Wide& w) { return {{{w.word[0], w.word[1]}}, {{w.word[2], w.word[3]}}}; }
  HK_DEVICE Wide words() const { return {{big.x[0], big.x[1], small.x[0], small.x[1]}}; }
};

// Features less what they are measured from. Infinity and what would round to it have no small part, and the other factor's, of
// either sign, is not multiplied by them: what is infinite stays so. Differences, so that a NaN is quiet and stays one, too.
struct SplitFeatures {
  FragmentA big, small, finite;

  HK_DEVICE static SplitFeatures make(const float* x) {
    SplitFeatures out;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool rounds = ::fabsf(x[j]) < kMostTf32;
      uint32_t big, small;
      split(x[j], big, small);
      out.big.x[j] = rounds ? big : __builtin_bit_cast(uint32_t, x[j]);
      out.small.x[j] = rounds ? small : 0;
      out.finite.x[j] = rounds ? big : 0;
    }
    return out;
  }
};

HK_DEVICE const FragmentA& beside_small(const SplitA& a) { return a.big; }
HK_DEVICE const FragmentA& beside_small(const SplitFeatures& a) { return a.finite; }

// sum += A B in three products, or fewer where a factor is exact (a half: its small part is 0). Tensor cores round their
// sums towards zero: they add up the 8 products of a step and no more.
template <class Left>
HK_DEVICE void add_product(FragmentC& sum, const Left& a, const SplitB& b, bool exact_a, bool exact_b) {
  FragmentC step{{0.f, 0.f, 0.f, 0.f}};
  if (!exact_b) step = product_tf32(beside_small(a), b.small);
  if (!exact_a) multiply_tf32(step, a.small, b.big);
  multiply_tf32(step, a.big, b.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.x[i] += step.x[i];
}

// Where a lane's elements lie in a fragment, see mma.cuh.
struct LaneOfFragment {
  int g, t;
  HK_DEVICE LaneOfFragment() : g(threadIdx.x % kWarp / 4), t(threadIdx.x % 4) {}
  HK_DEVICE int row(int j) const { return g + 8 * (j & 1); }      // of A
  HK_DEVICE int inner(int j) const { return t + 4 * (j >> 1); }   // of A
  HK_DEVICE int sum_row(int i) const { return g + 8 * (i >> 1); }
  HK_DEVICE int sum_column(int i) const { return 2 * t + (i & 1); }
};

}  // namespace hetero::cuda
