// Matrix products of bfloat16 numbers by the machine's dot instruction (AVX512_BF16), summed in float32.
//
// A word holds two neighbours of the dimension that is summed over. A float32 factor comes as the sum of two bfloat16 parts,
// high and low, which is right to 2^-17: enough for results that are rounded to bfloat16, and as fast as float32, so only
// features and weights that are both bfloat16 come here. The instruction takes numbers below 1.2e-38 for zero.
#pragma once

#include "gemm.h"

namespace hetero::cpu {

// Words of the factor that is spread over a vector; `low` is null where the high parts are exact. Steps as GemmOperand's.
struct PairOperand {
  const uint32_t *high, *low;
  int64_t step, next;

  PairOperand from(int64_t row) const { return {high + row * next, low ? low + row * next : nullptr, step, next}; }
};

template <class Part>
struct Bf16Dots {
  static constexpr bool kAvailable = false;
};

#if defined(__AVX512F__)
// Functions of their own, so that nothing else in this unit asks for the instruction.
#define HK_TARGET_BF16 __attribute__((target("avx512bf16")))

template <>
struct Bf16Dots<Vec<16>> {
  static constexpr bool kAvailable = true;

  // words[i] = (even[i], odd[i]); `count` is a multiple of 32.
  static void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, uint32_t* words) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    for (int64_t i = 0; i < count; i += 32) {
      const __m512i a = _mm512_loadu_si512(even + i), b = _mm512_loadu_si512(odd + i);
      _mm512_storeu_si512(words + i, _mm512_permutex2var_epi16(a, first, b));
      _mm512_storeu_si512(words + i + 16, _mm512_permutex2var_epi16(a, second, b));
    }
  }

  // x[i] = high[i] + low[i]; `count` is a multiple of 16.
  HK_TARGET_BF16 static void split(const float* x, int64_t count, uint16_t* high, uint16_t* low) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 value = _mm512_loadu_ps(x + i);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
      const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      const __m256i rest = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, back));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), rounded);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), rest);
    }
  }

  template <int Rows, int Vectors, bool Split>
  HK_NOINLINE HK_TARGET_BF16 static void block(int64_t steps, PairOperand a, GemmOperand<const float> b, float* c,
                                               int64_t c_row, int64_t c_vector, bool accumulate) {
    __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] = accumulate ? _mm512_loadu_ps(c + r * c_row + v * c_vector) : _mm512_setzero_ps();
      }
    }
    const float* words = b.data;
    for (int64_t t = 0; t < steps; ++t, words += b.step) {
      __m512bh line[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) line[v] = (__m512bh)_mm512_loadu_si512(words + v * b.next);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = t * a.step + r * a.next;
        const __m512bh high = (__m512bh)_mm512_set1_epi32(static_cast<int>(a.high[at]));
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], line[v], high);
        if constexpr (Split) {
          const __m512bh low = (__m512bh)_mm512_set1_epi32(static_cast<int>(a.low[at]));
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], line[v], low);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * c_row + v * c_vector, sum[r][v]);
    }
  }
};

// What `gemm` calls for these operands; b's elements are words.
template <class Part, int Rows, int Vectors>
void gemm_block(int64_t steps, PairOperand a, GemmOperand<const float> b, float* c, int64_t c_row, int64_t c_vector,
                bool accumulate) {
  const auto run = a.low ? &Bf16Dots<Part>::template block<Rows, Vectors, true>
                         : &Bf16Dots<Part>::template block<Rows, Vectors, false>;
  run(steps, a, b, c, c_row, c_vector, accumulate);
}
#endif

}  // namespace hetero::cpu
