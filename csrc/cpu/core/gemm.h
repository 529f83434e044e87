// Matrix products of a tile, kept in registers: c[r][v] (+)= sum_t a[t][r] b[t][v], v a vector.
#pragma once

#include <cstdint>

#include "vec.h"

namespace hetero::cpu {

// Where an operand's elements are: `step` from t to t + 1, `next` from row to row (a, c) or vector to vector (b, c).
template <class Real>
struct GemmOperand {
  Real* data;
  int64_t step, next;

  GemmOperand from(int64_t row) const { return {data + row * next, step, next}; }
};

// As many accumulators as the registers hold beside the operands.
template <class Part>
struct GemmShape {
  static constexpr int kRows = 6, kVectors = Part::kLanes == 16 ? 4 : 2;
};

template <class Part, int Rows, int Vectors, class Real>
HK_NOINLINE void gemm_block(int64_t steps, GemmOperand<const Real> a, GemmOperand<const Real> b, Real* c, int64_t c_row,
                            int64_t c_vector, bool accumulate) {
  Part sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = accumulate ? Part::load(c + r * c_row + v * c_vector) : Part(Real(0));
    }
  }
  const Real *at = a.data, *bt = b.data;
  for (int64_t t = 0; t < steps; ++t, at += a.step, bt += b.step) {
    Part line[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) line[v] = Part::load(bt + v * b.next);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Part factor(at[r * a.next]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, line[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v].store(c + r * c_row + v * c_vector);
  }
}

// `rows` rows of `vectors` vectors each, in blocks of nearly equal size. dot_bf16.h has another operand for a.
template <class Part, class Real, class Factors = GemmOperand<const Real>>
void gemm(int64_t rows, int64_t vectors, int64_t steps, Factors a, GemmOperand<const Real> b, Real* c, int64_t c_row,
          int64_t c_vector, bool accumulate) {
  using Shape = GemmShape<Part>;
  const auto columns = [&]<int Rows>(int64_t row) {
    const Factors a_block = a.from(row);
    int64_t v = 0;
    for (; v + Shape::kVectors <= vectors; v += Shape::kVectors) {
      gemm_block<Part, Rows, Shape::kVectors>(steps, a_block, b.from(v), c + row * c_row + v * c_vector, c_row, c_vector,
                                              accumulate);
    }
    for (; v < vectors; ++v) {
      gemm_block<Part, Rows, 1>(steps, a_block, b.from(v), c + row * c_row + v * c_vector, c_row, c_vector, accumulate);
    }
  };
  int64_t blocks = (rows + Shape::kRows - 1) / Shape::kRows;
  for (int64_t row = 0; row < rows; --blocks) {
    const int64_t size = (rows - row + blocks - 1) / blocks;
    switch (size) {
      case 1: columns.template operator()<1>(row); break;
      case 2: columns.template operator()<2>(row); break;
      case 3: columns.template operator()<3>(row); break;
      case 4: columns.template operator()<4>(row); break;
      case 5: columns.template operator()<5>(row); break;
      default: columns.template operator()<6>(row); break;
    }
    row += size;
  }
}

// out[j * out_stride + i] = in[i * in_stride + j] for one square of N.
template <int N>
HK_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, Vec<N>) {
  typename Vec<N>::Ints low, high;  // of two vectors, interleaved
  for (int i = 0; i < N; ++i) {
    low[i] = i / 2 + (i % 2) * N;
    high[i] = low[i] + N / 2;
  }
  const auto interleave = [&](const Vec<N>(&from)[N], Vec<N>(&to)[N]) HK_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      to[2 * i] = shuffle(from[i], from[i + N / 2], low);
      to[2 * i + 1] = shuffle(from[i], from[i + N / 2], high);
    }
  };
  const auto store = [&](const Vec<N>(&from)[N]) HK_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) from[i].store(out + i * out_stride);
  };
  Vec<N> x[N], y[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) x[i] = Vec<N>::load(in + i * in_stride);
  interleave(x, y);  // log2(N) times
  interleave(y, x);
  if constexpr (N == 4) return store(x);
  interleave(x, y);
  if constexpr (N == 8) return store(y);
  interleave(y, x);
  store(x);
}
HK_INLINE void transpose(const double* in, int64_t, double* out, int64_t, Lane) { *out = *in; }

}  // namespace hetero::cpu
