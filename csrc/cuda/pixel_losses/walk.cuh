// The walk over a tile that every loss shares: bands, rows, pixels; the sums of the two terms.
#pragma once

#include "labels.cuh"
#include "tile.cuh"

namespace hetero::cuda {

// The classes that a band's pixels are labelled with (Pixel::class_of), in shared memory.
class BandLabels {
 public:
  HK_DEVICE BandLabels(const Problem& p, const Tile& tile, SharedAllocator& memory) : p_(p), tile_(tile) {
    classes_ = memory.take<int16_t>(label_rows(p.rows.size) * tile.capacity);
  }

  // Rows [row, end) of the tile, at most kLabelRows, between two barriers.
  HK_DEVICE void stage(int row, int end) const {
    each_label(p_, end - row, tile_.x, tile_.columns, [&](int i) { return label_row(p_, tile_.image, tile_.y + row + i); },
               [&](int i, int column, int64_t label) {
                 classes_.set(at(row + i, column), static_cast<int16_t>(Pixel::class_of(p_, label)));
               });
  }

  HK_DEVICE int known(int row, int column) const { return classes_[at(row, column)]; }

 private:
  // Rows follow each other in a circle.
  HK_DEVICE int at(int row, int column) const { return row % kLabelRows * tile_.capacity + column; }

  const Problem& p_;
  const Tile& tile_;
  Shared<int16_t> classes_;
};

// The pixels of a thread's column.
class PixelReader {
 public:
  HK_DEVICE PixelReader(const Problem& p, const Tile& tile, const Lane& lane, const BandLabels& labels)
      : p_(p), tile_(tile), lane_(lane), labels_(labels) {
    upstream_ = tile.image * p.upstream_stride[0] + (tile.x + lane.column) * p.upstream_stride[2];
  }

  HK_DEVICE Pixel at(int row) const {
    const float* factor = p_.upstream + upstream_ + (tile_.y + row) * p_.upstream_stride[1];
    return Pixel::make(labels_.known(row, lane_.column), lane_.inside, p_.upstream ? read(factor) : 1.f);
  }

 private:
  const Problem& p_;
  const Tile& tile_;
  const Lane& lane_;
  const BandLabels& labels_;
  int64_t upstream_;
};

// The terms of a thread's pixels. A wrong label makes them NaN.
class PixelTerms {
 public:
  HK_DEVICE explicit PixelTerms(const Problem& p) : p_(p) {}

  // `place()` is where the pixel has its terms in maps, less than 0 for nowhere.
  template <class Place>
  HK_DEVICE void record(const Pixel& pixel, Place place, Value first, Value second) {
    const float nothing = pixel.wrong ? NAN : 0.f;
    const float a = pixel.valid ? first.v : nothing, b = pixel.valid ? second.v : nothing;
    sum_[0] += a;
    sum_[1] += b;
    valid_ += pixel.valid;
    if (!p_.output.maps) return;
    const int64_t at = place();
    if (at < 0) return;
    write(p_.output.term[0] + at, a);
    write(p_.output.term[1] + at, b);
    write(p_.output.loss + at, p_.term[0].weight * a + p_.term[1].weight * b);
  }

  // The block's part, the `index`th.
  HK_DEVICE void finish(int64_t index, Shared<float> first, Shared<float> second, Shared<int> third) const {
    const float a = sum_over_block(sum_[0], first), b = sum_over_block(sum_[1], second);
    const int valid = sum_over_block(valid_, third);
    if (threadIdx.x != 0 || p_.output.maps) return;
    write(p_.output.partial + 2 * index, a);
    write(p_.output.partial + 2 * index + 1, b);
    atomicAdd(p_.output.valid, static_cast<unsigned long long>(valid));
  }

 protected:
  const Problem& p_;

 private:
  float sum_[2] = {0.f, 0.f};
  int valid_ = 0;
};

// The same on a tile of rows and columns.
class TermSums : public PixelTerms {
 public:
  HK_DEVICE TermSums(const Problem& p, const Tile& tile, const Lane& lane)
      : PixelTerms(p), tile_(tile), speaks_(lane.member == 0), x_(lane.column), inside_(lane.inside) {}

  HK_DEVICE void record(const Pixel& pixel, int row, Value first, Value second) {
    if (!speaks_) return;
    const auto place = [&] { return inside_ ? (tile_.image * p_.rows.fine + tile_.y + row) * p_.columns.fine + tile_.x + x_ : -1; };
    PixelTerms::record(pixel, place, first, second);
  }

  HK_DEVICE void finish(Shared<float> first, Shared<float> second, Shared<int> third) const {
    PixelTerms::finish(tile_.index, first, second, third);
  }

 private:
  const Tile& tile_;
  const bool speaks_;
  const int x_;
  const bool inside_;
};

// 1 / the sum of a term's parts, 0 where that is 0; 1 where the term is divided by nothing, or later.
HK_DEVICE float inverse_divisor(const Term& term, Shared<float> scratch) {
  if (term.divisor != Divisor::kGiven) return 1.f;
  float sum = 0.f;
  for (int i = threadIdx.x; i < term.count; i += blockDim.x) sum += read(term.parts + i);
  const float divisor = sum_over_block(sum, scratch);
  return divisor == 0.f ? 0.f : 1.f / divisor;
}

// Arrays of a block beside its networks' (common_bytes).
struct CommonArrays {
  Shared<float> scratch[3], per_class;
  Shared<int> counts;

  HK_DEVICE CommonArrays(SharedAllocator& memory, const ClassOrder& order) {
    for (Shared<float>& s : scratch) s = memory.take<float>(kScratch);
    counts = memory.take<int>(kScratch);
    per_class = memory.take<float>(order.pitch);
  }
};

// Visits a tile's bands, in parts of at most kLabelRows rows: `loss.band(row, end, bounded)` between the barriers. A thread
// stages Loss::kStagedAtOnce elements of a row at a time.
template <class Loss>
HK_DEVICE void walk(const Problem& p, const Tile& tile, const Lane& lane, const BandLabels& labels, TileNetwork& student,
                    TileNetwork* teacher, Loss& loss) {
  student.prepare(p.temperature);
  if (teacher) teacher->prepare(p.temperature);
  __syncthreads();
  for (int row = 0; row < tile.rows;) {
    const int upper = student.upper_row(row), other = teacher ? teacher->upper_row(row) : 0;
    const int most = row + kLabelRows < tile.rows ? row + kLabelRows : tile.rows;
    int end = row + 1;
    while (end < most && student.upper_row(end) == upper && (!teacher || teacher->upper_row(end) == other)) ++end;
    labels.stage(row, end);
    bool beyond = student.template stage<Loss::kStagedAtOnce>(upper, p.limit);
    if (teacher) beyond = teacher->template stage<Loss::kStagedAtOnce>(other, p.limit) || beyond;
    const bool bounded = !__syncthreads_or(beyond);
    student.open(lane);
    if (teacher) teacher->open(lane);
    loss.band(row, end, bounded);
    __syncthreads();
    student.leave(end < tile.rows ? student.upper_row(end) : -1);
    if (teacher) teacher->leave(end < tile.rows ? teacher->upper_row(end) : -1);
    row = end;
  }
}

}  // namespace hetero::cuda
