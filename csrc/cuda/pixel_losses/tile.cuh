// A block's part of the loss grid: coarse logits staged in shared memory with their halo, interpolated on the way to a
// pixel, and the gradient the same way back.
//
// A thread owns a column of pixels, or a share of its classes, and walks down. Rows between the same coarse rows of every
// network are a *band*. During a band the two coarse rows around it are staged, as pairs, and the thread adds its gradient
// up there, at its own column. When the walk leaves a coarse row, the block takes the row's columns of pixels to coarse
// columns (the adjoint of horizontal interpolation) and writes them to the tile's slot.
#pragma once

#include "hakd_pixel.cuh"

namespace hetero::cuda {

// Logits of one class and column in the two coarse rows around a band.
struct alignas(8) Pair {
  float upper, lower;
};

struct Tile {
  int64_t index, image, y, x;  // number of the tile, its first pixel
  int row_tile, column_tile;
  int rows, columns, capacity;  // capacity: columns that arrays have room for

  HK_DEVICE explicit Tile(const Problem& p) {
    index = blockIdx.x;
    const int64_t row_of_tiles = index / p.columns.count, column = index % p.columns.count;
    const int64_t row = row_of_tiles % p.rows.count;
    image = row_of_tiles / p.rows.count;
    row_tile = static_cast<int>(row);
    column_tile = static_cast<int>(column);
    y = p.rows.begin(row);
    x = p.columns.begin(column);
    rows = static_cast<int>(p.rows.end(row) - y);
    columns = static_cast<int>(p.columns.end(column) - x);
    capacity = p.columns.size;
  }
};

// The part of a tile that a thread has.
struct Lane : ClassShare {
  ClassOrder order;
  int column;
  bool inside;

  HK_DEVICE Lane(const Problem& p, const Tile& tile) : Lane(p, tile, ClassOrder(p.classes, p.lanes)) {}

  HK_DEVICE Lane(const Problem& p, const Tile& tile, const ClassOrder& o) : ClassShare(p.classes, o.shift, threadIdx.x), order(o) {
    column = threadIdx.x >> order.shift;
    inside = column < tile.columns;
    if (!inside) column = tile.columns - 1;
  }

  HK_DEVICE int position(int i) const { return member * order.stride + i; }
};

// A pixel's four coarse neighbours.
struct Corners {
  Shared<Pair> pairs;
  int left, right;
  float upper_left, lower_left, upper_right, lower_right;  // weights

  // Of the class at a position of ClassOrder.
  HK_DEVICE Value logit(int position) const {
    const Pair l = pairs[left + position], r = pairs[right + position];
    return Value(::fmaf(lower_right, r.lower,
                        ::fmaf(upper_right, r.upper, ::fmaf(lower_left, l.lower, upper_left * l.upper))));
  }
};

// The same for the guarded mathematics, in natural units: what has no weight may be infinite.
struct NaturalCorners {
  Shared<Pair> pairs;
  int left, right;
  float x, y;  // weights of the right neighbours and of the lower ones

  HK_DEVICE Value logit(int position) const {
    const Pair l = pairs[left + position], r = pairs[right + position];
    const float upper = ::fmaf(x, r.upper, (1.f - x) * l.upper);
    return Value(y == 0.f ? upper : ::fmaf(y, ::fmaf(x, r.lower, (1.f - x) * l.lower), (1.f - y) * upper));
  }
};

// A matrix's elements in order, of which a thread has every blockDim.x-th: one division for all of them.
struct Cell {
  int row, column;

  HK_DEVICE explicit Cell(int width) : width_(width), rows_(blockDim.x / width), columns_(blockDim.x % width) {
    row = threadIdx.x / width;
    column = threadIdx.x % width;
  }
  HK_DEVICE void advance() {
    row += rows_;
    column += columns_;
    if (column < width_) return;
    column -= width_;
    ++row;
  }

 private:
  int width_, rows_, columns_;  // of a step
};

class TileNetwork {
 public:
  HK_DEVICE TileNetwork(const Network& network, const Problem& p, const Tile& tile, SharedAllocator& memory,
                        bool accumulates)
      : network_(network), tile_(tile), classes_(p.classes), order_(p.classes, p.lanes) {
    pairs_ = memory.take<Pair>(network.span * order_.pitch);
    left_ = memory.take<int16_t>(tile.capacity);
    part_ = memory.take<float>(tile.capacity);
    first_ = memory.take<int>(network.span + 2);
    row_ = memory.take<int>(p.rows.size);
    row_part_ = memory.take<float>(p.rows.size);
    if (accumulates) sums_ = memory.take<float>(2 * classes_ * tile.capacity);
    first_row_ = network.rows.lower(tile.y);
    first_column_ = network.columns.lower(tile.x);
    span_ = p.columns.reach(network.columns, tile.column_tile);
  }

  // Fills the tables of positions, and the classes without mass: e^z and e^{z / T} are 0; a barrier must follow.
  HK_DEVICE void prepare(float temperature) {
    const float nothing = -1000.f * (temperature > 1.f ? temperature : 1.f);
    for (int n = threadIdx.x; n < span_; n += blockDim.x) {
      for (int c = classes_; c < order_.filled; ++c) pairs_.set(n * order_.pitch + order_.position(c), {nothing, nothing});
    }
    for (int i = threadIdx.x; i < tile_.rows; i += blockDim.x) {
      const int64_t lower = network_.rows.lower(tile_.y + i);
      row_.set(i, static_cast<int>(lower - first_row_));
      row_part_.set(i, network_.rows.fraction(tile_.y + i, lower));
    }
    for (int i = threadIdx.x; i < tile_.columns; i += blockDim.x) {
      const int64_t lower = network_.columns.lower(tile_.x + i);
      left_.set(i, static_cast<int16_t>(lower - first_column_));
      part_.set(i, network_.columns.fraction(tile_.x + i, lower));
    }
    for (int n = threadIdx.x; n < span_ + 2; n += blockDim.x) {
      const int64_t first = network_.columns.first(first_column_ + n) - tile_.x;
      first_.set(n, static_cast<int>(first < 0 ? 0 : first < tile_.columns ? first : tile_.columns));
    }
  }

  // Upper coarse row of a row of pixels, counted from the tile's first.
  HK_DEVICE int upper_row(int row) const { return row_[row]; }

  // Stages coarse row `upper` and the one after it where they are not there yet, between two barriers. Returns whether a
  // logit of the band is beyond `limit`; a NaN is not. `Elements`: of a row, that a thread asks for at once.
  template <int Elements>
  HK_DEVICE bool stage(int upper, float limit) {
    fresh_ = upper != upper_;
    if (!fresh_) return beyond_;
    const bool next = upper == upper_ + 1 && !network_.rows.identity;
    carried_ = next;
    upper_ = upper;
    beyond_ = false;
    const int64_t row = first_row_ + upper;
    const bool has_lower = !network_.rows.identity && row + 1 < network_.rows.coarse;
    const int64_t start = tile_.image * network_.stride[0] + row * network_.stride[2] + first_column_ * network_.stride[3];
    if (network_.dtype == DType::kFloat) {
      stage_rows<Elements>(static_cast<const float*>(network_.logits) + start, next, has_lower, limit);
    } else {
      stage_rows<Elements>(static_cast<const uint16_t*>(network_.logits) + start, next, has_lower, limit);
    }
    return beyond_;
  }

  // A pixel's corners; logits come multiplied by `unit`.
  HK_DEVICE Corners corners(const Lane& lane, int row, float unit) const {
    const float x = part_[lane.column], y = row_part_[row];
    const int left = left_[lane.column];
    const bool single = network_.columns.identity || first_column_ + left + 1 >= network_.columns.coarse;
    return {pairs_, left * order_.pitch, (left + !single) * order_.pitch, (1.f - x) * (1.f - y) * unit, (1.f - x) * y * unit,
            x * (1.f - y) * unit, x * y * unit};
  }

  HK_DEVICE NaturalCorners natural_corners(const Lane& lane, int row) const {
    const float x = part_[lane.column];
    const int left = left_[lane.column] * order_.pitch;
    // Half of the same twice, exactly, where there is one neighbour.
    return x == 0.f ? NaturalCorners{pairs_, left, left, 0.5f, row_part_[row]}
                    : NaturalCorners{pairs_, left, left + order_.pitch, x, row_part_[row]};
  }

  HK_DEVICE float row_part(int row) const { return row_part_[row]; }

  // After staging's barrier: makes the thread's sums ready for the band.
  HK_DEVICE void open(const Lane& lane) {
    if (!network_.gradient || !fresh_) return;
    side_ = !side_;
    for (int i = 0; lane.inside && i < lane.classes; ++i) {
      if (!carried_) sums_.set(at(side_, i, lane), 0.f);
      sums_.set(at(!side_, i, lane), 0.f);
    }
  }

  // The thread's sum of its class i's gradient at the band's upper coarse row (`lower` 0) or lower one (1).
  HK_DEVICE Value sum(int lower, int i, const Lane& lane) const {
    return Value(lane.inside ? sums_[at(side_ ^ lower, i, lane)] : 0.f);
  }
  HK_DEVICE void set_sum(int lower, int i, const Lane& lane, Value x) const {
    if (lane.inside) sums_.set(at(side_ ^ lower, i, lane), x.v);
  }
  // Adds a gradient of a pixel of `row`.
  HK_DEVICE void add(int row, int i, const Lane& lane, Value g) const {
    const Value below(row_part_[row]), above(1.f - row_part_[row]);
    set_sum(0, i, lane, fma(above, g, sum(0, i, lane)));
    set_sum(1, i, lane, fma(below, g, sum(1, i, lane)));
  }

  // After a barrier: writes the coarse rows that the walk leaves, if `upper` (-1 at the end) is the next one.
  HK_DEVICE void leave(int upper) const {
    if (!network_.gradient || upper == upper_) return;
    write_row(0, upper_);
    if (upper != upper_ + 1 && !network_.rows.identity) write_row(1, upper_ + 1);
  }

 private:
  // Rows whose first element is `from`; `next`: the upper one has been staged as the lower one.
  template <int Elements, class T>
  HK_DEVICE void stage_rows(const T* from, bool next, bool has_lower, float limit) {
    const bool by_class = network_.stride[1] <= network_.stride[3];  // the order in which logits lie in memory
    Cell cell(by_class ? classes_ : span_);
    const int rows = by_class ? span_ : classes_;
    while (cell.row < rows) {
      T upper[Elements], lower[Elements];
      float scale[Elements], shift[Elements];
      int places[Elements];
#pragma unroll
      for (int i = 0; i < Elements; ++i, cell.advance()) {
        places[i] = -1;
        if (cell.row >= rows) continue;
        const int c = by_class ? cell.column : cell.row, n = by_class ? cell.row : cell.column;
        const T* at = from + c * network_.stride[1] + n * network_.stride[3];
        places[i] = n * order_.pitch + order_.position(c);
        if (!next) upper[i] = read(at);
        if (has_lower) lower[i] = read(at + network_.stride[2]);
        if (!network_.scale) continue;
        scale[i] = read(network_.scale + c);
        shift[i] = read(network_.shift + c);
      }
#pragma unroll
      for (int i = 0; i < Elements; ++i) {
        if (places[i] < 0) continue;
        const auto meaning = [&](T logit) {  // of a raw one
          const float z = to_float(logit, network_.dtype);
          return network_.scale ? normalized(z, scale[i], shift[i], network_.relu) : z;
        };
        Pair pair;
        pair.upper = next ? pairs_[places[i]].lower : meaning(upper[i]);
        // Without a row below, its weight is 0: any number does, but not a NaN that the pixel does not reach.
        pair.lower = has_lower ? meaning(lower[i]) : network_.rows.identity ? 0.f : pair.upper;
        pairs_.set(places[i], pair);
        beyond_ = beyond_ || ::fabsf(pair.upper) > limit || ::fabsf(pair.lower) > limit;
      }
    }
  }

  HK_DEVICE int at(int side, int c, int column) const { return (side * classes_ + c) * tile_.capacity + column; }
  HK_DEVICE int at(int side, int i, const Lane& lane) const {
    return at(side, lane.number(i), lane.column);
  }

  HK_DEVICE void write_row(int lower, int row) const {
    if (first_row_ + row >= network_.rows.coarse) return;
    const int side = side_ ^ lower;
    float* out = network_.gradient + (tile_.index * network_.slot_rows + row) * classes_ * network_.span;
    int64_t stride = network_.span;
    if (network_.direct) {
      stride = network_.rows.coarse * network_.columns.coarse;
      out = network_.gradient + tile_.image * classes_ * stride + (first_row_ + row) * network_.columns.coarse + tile_.x;
    }
    for (Cell cell(span_); cell.row < classes_; cell.advance()) {
      const int c = cell.row, n = cell.column;
      float sum = 0.f;
      if (network_.columns.identity) {
        sum = sums_[at(side, c, n)];
      } else {
        const int middle = first_[n];  // pixels before it have column n on their right, the others on their left
        for (int x = n > 0 ? first_[n - 1] : 0; x < middle; ++x) sum = ::fmaf(part_[x], sums_[at(side, c, x)], sum);
        for (int x = middle; x < first_[n + 1]; ++x) sum = ::fmaf(1.f - part_[x], sums_[at(side, c, x)], sum);
      }
      write(out + c * stride + n, sum);
    }
  }

  const Network& network_;
  const Tile& tile_;
  const int classes_;
  const ClassOrder order_;
  Shared<Pair> pairs_;
  Shared<int16_t> left_;  // a tile's span fits shared memory, and so this
  Shared<int> first_, row_;
  Shared<float> part_, row_part_, sums_;
  int64_t first_row_, first_column_;
  int span_;
  int upper_ = -2, side_ = 0;
  bool fresh_ = false, carried_ = false, beyond_ = false;
};

}  // namespace hetero::cuda
