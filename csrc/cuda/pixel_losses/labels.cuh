// Labels on their way from memory. Those of a row usually lie side by side there: then one load brings a run of them, 16 bytes
// of int64 or int32, 4 bytes of uint8.
#pragma once

#include "problem.cuh"

namespace hetero::cuda {

// Labels that lie side by side. Runs begin at multiples of their size, run 0 at or before the first label; a run that reaches
// beyond the labels is read one by one.
template <class T>
class LabelRuns {
 public:
  static constexpr int kBytes = sizeof(T) == 1 ? 4 : 16;  // a warp's loads bring 128 labels or 64
  static constexpr int kRun = kBytes / int(sizeof(T));

  HK_DEVICE LabelRuns(const T* labels, int count)
      : labels_(labels), count_(count), skew_(static_cast<int>(reinterpret_cast<uintptr_t>(labels) % kBytes / sizeof(T))) {}

  HK_DEVICE int runs() const { return (skew_ + count_ + kRun - 1) / kRun; }
  HK_DEVICE bool whole(int run) const { return run * kRun >= skew_ && (run + 1) * kRun <= skew_ + count_; }
  HK_DEVICE Wide load(int run) const {
    if (!whole(run)) return {};
    const T* from = labels_ + run * kRun - skew_;
    if constexpr (kBytes == 4) return {{read(reinterpret_cast<const uint32_t*>(from))}};
    return read_wide(from);
  }

  // use(i, label) for the labels of a run; `loaded`: what load() gave.
  template <class Use>
  HK_DEVICE void each(int run, const Wide& loaded, Use use) const {
    const int begin = run * kRun - skew_;
    if (whole(run)) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) use(begin + i, loaded.element<T>(i));
      return;
    }
    const int end = begin + kRun < count_ ? begin + kRun : count_;
#pragma unroll 1
    for (int i = begin > 0 ? begin : 0; i < end; ++i) use(i, read(labels_ + i));
  }

 private:
  const T* labels_;
  const int count_, skew_;
};

// Where a row of the loss grid has its labels, as an offset.
HK_DEVICE int64_t label_row(const Problem& p, int64_t image, int64_t y) {
  const int64_t row = p.labels.sampled ? nearest_index(y, p.rows.fine, p.labels.height) : y;
  return image * p.labels.stride[0] + row * p.labels.stride[1];
}

// Where a pixel has its label in that row, as an offset.
HK_DEVICE int64_t label_column(const Problem& p, int64_t x) {
  return (p.labels.sampled ? nearest_index(x, p.columns.fine, p.labels.width) : x) * p.labels.stride[2];
}

template <class T, class Row, class Use>
HK_DEVICE void each_label_of_runs(const T* labels, int rows, int columns, Row offset, Use use) {
  constexpr int kRows = 2, kRuns = sizeof(T) == 8 ? 2 : 1;  // of a thread, under way at once
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int row = warp; row < rows; row += kRows * warps) {
    const auto runs_of = [&](int i) { return LabelRuns<T>(labels + offset(row + i * warps), columns); };
    const LabelRuns<T> of[kRows] = {runs_of(0), row + warps < rows ? runs_of(1) : LabelRuns<T>(labels, 0)};
    const int most = of[0].runs() > of[1].runs() ? of[0].runs() : of[1].runs();
    for (int run = lane; run < most; run += kRuns * kWarp) {
      Wide loaded[kRows][kRuns];
#pragma unroll
      for (int i = 0; i < kRows * kRuns; ++i) loaded[i / kRuns][i % kRuns] = of[i / kRuns].load(run + i % kRuns * kWarp);
#pragma unroll
      for (int i = 0; i < kRows * kRuns; ++i) {
        of[i / kRuns].each(run + i % kRuns * kWarp, loaded[i / kRuns][i % kRuns],
                           [&](int x, int64_t label) { use(row + i / kRuns * warps, x, label); });
      }
    }
  }
}

// use(row, i, label) for the labels of `columns` pixels from column x on, in rows that offset(row) says where they are, each by
// one thread of the block: a warp has every few rows, a lane some of their runs.
template <class Row, class Use>
HK_DEVICE void each_label(const Problem& p, int rows, int64_t x, int columns, Row offset, Use use) {
  const Labels& labels = p.labels;
  if (!labels.sampled && labels.stride[2] == 1) {
    const auto with_type = [&](const auto* data) { each_label_of_runs(data + x, rows, columns, offset, use); };
    if (labels.type == LabelType::kInt64) return with_type(static_cast<const int64_t*>(labels.data));
    if (labels.type == LabelType::kInt32) return with_type(static_cast<const int32_t*>(labels.data));
    return with_type(static_cast<const uint8_t*>(labels.data));
  }
  for (int row = threadIdx.x / kWarp; row < rows; row += blockDim.x / kWarp) {
    const int64_t start = offset(row);
    for (int i = threadIdx.x % kWarp; i < columns; i += kWarp) {
      use(row, i, read_label(labels.data, labels.type, start + label_column(p, x + i)));
    }
  }
}

}  // namespace hetero::cuda
