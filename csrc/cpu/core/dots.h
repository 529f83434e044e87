// Matrix products whose operands both have the summed dimension side by side: c[r][s] += sum_t a[r][t] b[s][t],
// s side by side.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace hetero::cpu {

// The sums of four vectors' lanes, added to out[0] to out[3] in an order that depends on nothing.
template <int N>
HK_INLINE void add_sums(Vec<N> a, Vec<N> b, Vec<N> c, Vec<N> d, float* out) {
  typename Vec<N>::Ints even, odd, low, high;
  for (int i = 0; i < N; ++i) {
    even[i] = i / 2 * 2 + i % 2 * N;
    odd[i] = even[i] + 1;
    low[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * N;
    high[i] = low[i] + 2;
  }
  const Vec<N> ab = shuffle(a, b, even) + shuffle(a, b, odd), cd = shuffle(c, d, even) + shuffle(c, d, odd);
  const Vec<N> all = shuffle(ab, cd, low) + shuffle(ab, cd, high);
  alignas(64) float lanes[N];
  all.store(lanes);
  Vec<4> sum = Vec<4>::load(lanes);
  for (int j = 4; j < N; j += 4) sum = sum + Vec<4>::load(lanes + j);
  (Vec<4>::load(out) + sum).store(out);
}
HK_INLINE void add_sums(Lane a, Lane b, Lane c, Lane d, double* out) {
  out[0] += a.v;
  out[1] += b.v;
  out[2] += c.v;
  out[3] += d.v;
}

// Rows that are `stride` apart.
template <class Real>
struct RowMatrix {
  Real* data;
  int64_t stride;
};

constexpr int kDotColumns = 4;

template <class Part, int Count, class Real>
HK_NOINLINE void dots_block(int64_t vectors, RowMatrix<const Real> a, RowMatrix<const Real> b, Real* c, int64_t c_row) {
  Part sum[Count][kDotColumns];
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kDotColumns; ++s) sum[r][s] = Part(Real(0));
  }
  for (int64_t t = 0; t < vectors * Part::kLanes; t += Part::kLanes) {
    Part line[kDotColumns];
#pragma GCC unroll 4
    for (int s = 0; s < kDotColumns; ++s) line[s] = Part::load(b.data + s * b.stride + t);
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      const Part factor = Part::load(a.data + r * a.stride + t);
#pragma GCC unroll 4
      for (int s = 0; s < kDotColumns; ++s) sum[r][s] = fma(factor, line[s], sum[r][s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) add_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3], c + r * c_row);
}

// `rows` of a by `columns` of b, in blocks of nearly equal size; b and c have room for whole blocks of kDotColumns columns.
template <class Part, class Real>
void dots(int64_t rows, int64_t columns, int64_t vectors, RowMatrix<const Real> a, RowMatrix<const Real> b, Real* c,
          int64_t c_row) {
  int64_t blocks = (rows + GemmShape<Part>::kRows - 1) / GemmShape<Part>::kRows;
  for (int64_t row = 0; row < rows; --blocks) {
    const int64_t size = (rows - row + blocks - 1) / blocks;
    const auto with_columns = [&]<int Count>() {
      for (int64_t s = 0; s < columns; s += kDotColumns) {
        dots_block<Part, Count, Real>(vectors, {a.data + row * a.stride, a.stride}, {b.data + s * b.stride, b.stride},
                                      c + row * c_row + s, c_row);
      }
    };
    switch (size) {
      case 1: with_columns.template operator()<1>(); break;
      case 2: with_columns.template operator()<2>(); break;
      case 3: with_columns.template operator()<3>(); break;
      case 4: with_columns.template operator()<4>(); break;
      case 5: with_columns.template operator()<5>(); break;
      default: with_columns.template operator()<6>(); break;
    }
    row += size;
  }
}

}  // namespace hetero::cpu
