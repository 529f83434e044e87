// The walk over a tile that every loss shares: bands, rows, pixels; the sums of the two terms.
#pragma once

#include "tile.cuh"

namespace hetero::cuda {

// Reads the pixels of a thread's column.
class PixelReader {
 public:
  HK_DEVICE PixelReader(const Problem& p, const Tile& tile, const Lane& lane) : p_(p), tile_(tile), inside_(lane.inside) {
    const int64_t x = tile.x + lane.column;
    const int64_t column = p.labels.sampled ? nearest_index(x, p.columns.fine, p.labels.width) : x;
    label_ = tile.image * p.labels.stride[0] + column * p.labels.stride[2];
    upstream_ = tile.image * p.upstream_stride[0] + x * p.upstream_stride[2];
  }

  HK_DEVICE Pixel at(int row) const {
    const int64_t y = tile_.y + row;
    const int64_t label_row = p_.labels.sampled ? nearest_index(y, p_.rows.fine, p_.labels.height) : y;
    const int64_t label = read_label(p_.labels.data, p_.labels.type, label_ + label_row * p_.labels.stride[1]);
    return Pixel::make(p_, label, inside_, p_.upstream ? read(p_.upstream + upstream_ + y * p_.upstream_stride[1]) : 1.f);
  }

 private:
  const Problem& p_;
  const Tile& tile_;
  const bool inside_;
  int64_t label_, upstream_;
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

// Visits a tile's bands: `loss.band(student, teacher, row, end, bounded)` between the barriers.
template <class Loss>
HK_DEVICE void walk(const Problem& p, const Tile& tile, const Lane& lane, TileNetwork& student, TileNetwork* teacher,
                    Loss& loss) {
  student.prepare();
  if (teacher) teacher->prepare();
  __syncthreads();
  for (int row = 0; row < tile.rows;) {
    const int upper = student.upper_row(row), other = teacher ? teacher->upper_row(row) : 0;
    int end = row + 1;
    while (end < tile.rows && student.upper_row(end) == upper && (!teacher || teacher->upper_row(end) == other)) ++end;
    bool beyond = student.stage(upper, p.limit);
    if (teacher) beyond = teacher->stage(other, p.limit) || beyond;
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
