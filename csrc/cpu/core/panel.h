// Matrix products of blocks in cache whose distances are known when they are compiled: c[r][x] (+)= sum_t a[t][r] b[t][x], and
// with the summed dimension side by side c[r][s] += sum_t a[r][t] b[s][t]. While they run they ask for memory that is read soon.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace hetero::cpu {

// Memory that is read soon: a grid of lines of 64 bytes, `step` bytes apart for a block's steps and `next` from block to block,
// of which there are `lines`.
struct Ahead {
  const char* data = nullptr;
  int64_t step = 0, next = 64, lines = 0;
};

// One line a step; a block's others before its first step.
class Asked {
 public:
  HK_INLINE Asked(const Ahead& ahead, int64_t steps, const void* cached)
      : line_(ahead.lines ? ahead.data : static_cast<const char*>(cached)), step_(ahead.lines ? ahead.step : 0) {
    for (int64_t line = 1; line < ahead.lines; ++line) {
      for (int64_t t = 0; t < steps; ++t) __builtin_prefetch(ahead.data + ahead.next * line + ahead.step * t, 0, 2);
    }
  }
  // Without a branch: where nothing is wanted it asks for what is there.
  HK_INLINE void next() {
    __builtin_prefetch(line_, 0, 2);
    line_ += step_;
  }

 private:
  const char* line_;
  int64_t step_;
};

// Gives it out: each block of a product asks for its share, one line of it a step.
class AheadShares {
 public:
  AheadShares(Ahead ahead, int64_t blocks) : rest_(ahead), share_((ahead.lines + blocks - 1) / (blocks > 0 ? blocks : 1)) {}
  Ahead share() {
    const Ahead out{rest_.data, rest_.step, rest_.next, share_ < rest_.lines ? share_ : rest_.lines};
    rest_.data += rest_.next * out.lines;
    rest_.lines -= out.lines;
    return out;
  }

 private:
  Ahead rest_;
  int64_t share_;
};

// Rows in memory less numbers, that are copied to b (`into` is b) while the first block of a product's rows runs.
template <class Real>
struct Source {
  const Real* rows;
  int64_t step;
  const Real* less;
  Real* into;
};

// Whether b is there or is filled first, with one number less for each row of the source or one for each of its columns, and how
// c is stored.
enum class Panel { kPlain, kFill, kFillColumns, kStream };
constexpr bool is_filled(Panel way) { return way == Panel::kFill || way == Panel::kFillColumns; }

template <class Real>
struct PanelArguments {
  int64_t steps;
  const Real* a;  // [steps][a_step], the block's rows side by side
  int64_t a_step;
  const Real* b;  // [steps][Pitch]
  Real* c;        // [rows][c_row]
  int64_t c_row;
  bool accumulate;
  Source<Real> source = {};
};

template <class Part, int Rows, int Vectors, int Pitch, Panel Way, class Real>
HK_NOINLINE void panel_block(const PanelArguments<Real>& p, Ahead ahead) {
  constexpr int kLanes = Part::kLanes;
  Part sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Part(Real(0));
  }
  const Real *at = p.a, *bt = p.b, *from = p.source.rows, *less = p.source.less;
  Real* into = p.source.into;
  const int64_t a_step = p.a_step, source_step = p.source.step;
  Asked asked(ahead, p.steps, bt);
  for (const Real* const end = bt + p.steps * Pitch; bt != end; bt += Pitch, at += a_step) {
    if constexpr (Way != Panel::kStream) asked.next();
    Part line[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (is_filled(Way)) {
        line[v] = Part::load(from + v * kLanes) - (Way == Panel::kFill ? Part(*less) : Part::load(less + v * kLanes));
        line[v].store(into + v * kLanes);
      } else {
        line[v] = Part::load(bt + v * kLanes);
      }
    }
    if constexpr (is_filled(Way)) from += source_step, into += Pitch;
    if constexpr (Way == Panel::kFill) ++less;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Part factor(at[r]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, line[v], sum[r][v]);
    }
  }
  Real* out = p.c;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r, out += p.c_row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      Real* to = out + v * kLanes;
      if constexpr (Way == Panel::kStream) {
        sum[r][v].stream(to);
      } else {
        (p.accumulate ? Part::load(to) + sum[r][v] : sum[r][v]).store(to);  // sums of sums: rounded less often
      }
    }
  }
}

// use.template operator()<Count>(first) for `rows` in blocks of nearly equal size, at most Most (6).
template <class Use>
HK_INLINE void in_blocks(int64_t rows, int64_t most, Use use) {
  int64_t blocks = (rows + most - 1) / most;
  for (int64_t row = 0; row < rows; --blocks) {
    const int64_t size = (rows - row + blocks - 1) / blocks;
    switch (size) {
      case 1: use.template operator()<1>(row); break;
      case 2: use.template operator()<2>(row); break;
      case 3: use.template operator()<3>(row); break;
      case 4: use.template operator()<4>(row); break;
      case 5: use.template operator()<5>(row); break;
      default: use.template operator()<6>(row); break;
    }
    row += size;
  }
}

// Columns of a panel.
template <class Part>
constexpr int kPanelPitch = GemmShape<Part>::kVectors * Part::kLanes;

// `rows` rows of `vectors` vectors each. Panels of b, a few vectors wide, stay in the first-level cache for all rows. Filled ones
// take turns in the same memory, of kPanelPitch columns; streamed ones (kStream) end in whole lines past the caches.
template <class Part, int Pitch, class Real, Panel Way = Panel::kPlain>
void panels(int64_t rows, int64_t vectors, const PanelArguments<Real>& p, Ahead ahead = {}) {
  constexpr int kVectors = GemmShape<Part>::kVectors, kRows = GemmShape<Part>::kRows, kLanes = Part::kLanes;
  AheadShares shares(ahead, (rows + kRows - 1) / kRows * (vectors / kVectors + vectors % kVectors));
  const auto panel = [&]<int Vectors>(int64_t v) {
    const int64_t x = v * kLanes;
    PanelArguments<Real> block = p;
    if constexpr (is_filled(Way)) {
      block.source.rows += x;
      if constexpr (Way == Panel::kFillColumns) block.source.less += x;
    } else {
      block.b += x;
    }
    in_blocks(rows, kRows, [&]<int Count>(int64_t row) {
      block.a = p.a + row;
      block.c = p.c + row * p.c_row + x;
      if (is_filled(Way) && row > 0) {
        panel_block<Part, Count, Vectors, Pitch, Panel::kPlain, Real>(block, shares.share());
      } else {
        panel_block<Part, Count, Vectors, Pitch, Way, Real>(block, shares.share());
      }
    });
  };
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) panel.template operator()<kVectors>(v);
  for (; v < vectors; ++v) panel.template operator()<1>(v);
}

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

constexpr int kDotColumns = 4;

template <class Real>
struct DotArguments {
  int64_t vectors;
  const Real* a;  // [rows][a_row]
  int64_t a_row;
  const Real* b;  // [columns][Pitch]
  Real* c;        // [rows][c_row]
  int64_t c_row;
  Source<Real> source = {};  // of b's columns, which are its rows
};

template <class Part, int Rows, int Pitch, Panel Way, class Real>
HK_NOINLINE void dots_block(const DotArguments<Real>& p, Ahead ahead) {
  Part sum[Rows][kDotColumns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kDotColumns; ++s) sum[r][s] = Part(Real(0));
  }
  const Real *at = p.a, *bt = p.b, *from = p.source.rows, *less = p.source.less;
  Real* into = p.source.into;
  const int64_t a_row = p.a_row, source_step = p.source.step;
  Asked asked(ahead, p.vectors, bt);
  for (const Real* const end = bt + p.vectors * Part::kLanes; bt != end; bt += Part::kLanes, at += Part::kLanes) {
    asked.next();
    Part line[kDotColumns];
#pragma GCC unroll 4
    for (int s = 0; s < kDotColumns; ++s) {
      if constexpr (is_filled(Way)) {
        line[s] = Part::load(from + s * source_step) - (Way == Panel::kFill ? Part(less[s]) : Part::load(less));
        line[s].store(into + s * Pitch);
      } else {
        line[s] = Part::load(bt + s * Pitch);
      }
    }
    if constexpr (is_filled(Way)) from += Part::kLanes, into += Part::kLanes;
    if constexpr (Way == Panel::kFillColumns) less += Part::kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Part factor = Part::load(at + r * a_row);
#pragma GCC unroll 4
      for (int s = 0; s < kDotColumns; ++s) sum[r][s] = fma(factor, line[s], sum[r][s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) add_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3], p.c + r * p.c_row);
}

// `rows` of a by `columns` of b; b and c have room for whole blocks of kDotColumns columns, and so has b's source where there is
// one: its blocks take turns in the same memory.
template <class Part, int Pitch, Panel Way, class Real>
void dots(int64_t rows, int64_t columns, const DotArguments<Real>& p, Ahead ahead = {}) {
  constexpr int kRows = GemmShape<Part>::kRows;
  AheadShares shares(ahead, (rows + kRows - 1) / kRows * ((columns + kDotColumns - 1) / kDotColumns));
  for (int64_t s = 0; s < columns; s += kDotColumns) {
    DotArguments<Real> block = p;
    if constexpr (is_filled(Way)) {
      block.source.rows += s * p.source.step;
      if constexpr (Way == Panel::kFill) block.source.less += s;
    } else {
      block.b += s * Pitch;
    }
    in_blocks(rows, kRows, [&]<int Count>(int64_t row) {
      block.a = p.a + row * p.a_row;
      block.c = p.c + row * p.c_row + s;
      if (is_filled(Way) && row > 0) {
        dots_block<Part, Count, Pitch, Panel::kPlain, Real>(block, shares.share());
      } else {
        dots_block<Part, Count, Pitch, Way, Real>(block, shares.share());
      }
    });
  }
}

}  // namespace hetero::cpu
