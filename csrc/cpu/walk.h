// The walk over the loss grid that every loss shares: items, blocks of columns, rows, vectors of pixels.
#pragma once

#include "tile.h"

namespace hetero::cpu {

// One class per pixel of a vector: the label or the anchor; -1 for none.
template <class V>
struct ClassPerPixel {
  const int32_t* classes;
  int lowest = INT32_MAX, highest = -1;

  explicit ClassPerPixel(const int32_t* per_pixel) : classes(per_pixel) {
    for (int i = 0; i < V::kLanes; ++i) {
      const int32_t k = classes[i];
      lowest = k >= 0 && k < lowest ? k : lowest;
      highest = k > highest ? k : highest;
    }
  }

  HK_INLINE Chosen<V> at(int64_t c) const {
    const int32_t k = static_cast<int32_t>(c);
    return {equals(classes, k, V()), k < lowest || k > highest};
  }

  // The value that each pixel has at its class: `value(k)` is asked for the classes that occur.
  template <class Value>
  V pick(Value value) const {
    V found(typename V::Real(0));
    for (int k = lowest; k <= highest; ++k) {
      bool occurs = false;
      for (int i = 0; i < V::kLanes; ++i) occurs = occurs || classes[i] == k;
      if (occurs) found = select(equals(classes, k, V()), value(k), found);
    }
    return found;
  }
};

// A vector of pixels: labels and factors of their gradients.
template <class V>
struct Pixels {
  using Real = typename V::Real;
  ClassPerPixel<V> labels;
  typename V::Mask valid;
  V factor;

  Pixels(const int32_t* row_labels, const Real* factors, int x)
      : labels(row_labels + x), valid(not_negative(row_labels + x, V())), factor(V::load(factors + x)) {}

  bool none_valid() const { return labels.highest < 0; }
  HK_INLINE V masked(V x) const { return select(valid, x, V(Real(0))); }
};

// A row of a block: label and factor buffers, the sums of the two terms.
template <class V>
class RowBuffers {
 public:
  using Real = typename V::Real;

  RowBuffers(const PixelProblem<Real>& problem, Scratch& scratch)
      : problem_(problem),
        labels(static_cast<int32_t*>(scratch.take(int64_t(problem.block) * 4))),
        factors(static_cast<Real*>(scratch.take(int64_t(problem.block) * sizeof(Real)))) {}

  static int64_t bytes(const PixelProblem<Real>& problem) { return int64_t(problem.block) * (4 + sizeof(Real)) + 128; }

  // Returns whether any pixel counts.
  bool load(int64_t image, int64_t row, int64_t x0, int n) {
    const int valid = load_labels(problem_, image, row, x0, n, labels);
    for (int x = n; x < problem_.block; ++x) labels[x] = -1;
    const Real* upstream = problem_.upstream;
    if (upstream == nullptr) {
      for (int x = 0; x < problem_.block; ++x) factors[x] = 1;
    } else {
      upstream += image * problem_.upstream_stride[0] + row * problem_.upstream_stride[1];
      for (int x = 0; x < n; ++x) factors[x] = upstream[(x0 + x) * problem_.upstream_stride[2]];
      for (int x = n; x < problem_.block; ++x) factors[x] = 0;
    }
    sums_[0] = sums_[1] = V(Real(0));
    return valid > 0;
  }

  // Takes both terms of a vector of pixels, 0 where ignored.
  void record(int64_t image, int64_t row, int64_t x0, int x, int n, V first, V second) {
    sums_[0] = sums_[0] + first;
    sums_[1] = sums_[1] + second;
    if (problem_.maps[0] == nullptr) return;
    alignas(64) Real terms[2][V::kLanes];
    first.store(terms[0]);
    second.store(terms[1]);
    const int64_t at = (image * problem_.height + row) * problem_.width + x0 + x;
    for (int i = 0; i < V::kLanes && x + i < n; ++i) {
      problem_.maps[0][at + i] = terms[0][i];
      problem_.maps[1][at + i] = terms[1][i];
    }
  }

  void add_to(double* partial) const {
    for (int term = 0; term < 2; ++term) {
      alignas(64) Real lanes[V::kLanes];
      sums_[term].store(lanes);
      for (int i = 0; i < V::kLanes; ++i) partial[term] += lanes[i];
    }
  }

 private:
  const PixelProblem<Real>& problem_;
  V sums_[2];

 public:
  int32_t* const labels;
  Real* const factors;
};

// Walks items [begin, end): `on_pixels(image, row, x0, x, n, Pixels, student row, teacher row, bounded, buffers)` for every
// vector with a pixel that counts; `on_block(item)` after every block.
template <class V, class OnPixels, class OnBlock>
void walk(const PixelProblem<typename V::Real>& problem, Scratch& scratch, int64_t begin, int64_t end, OnPixels on_pixels,
          OnBlock on_block) {
  Tile<V> student(problem.student, problem, scratch);
  Tile<V> teacher(problem.has_teacher ? problem.teacher : problem.student, problem, scratch);
  RowBuffers<V> buffers(problem, scratch);
  Tile<V>* networks[2] = {&student, problem.has_teacher ? &teacher : nullptr};

  for (int64_t index = begin; index < end; ++index) {
    const Item& item = problem.items[index];
    for (Tile<V>* network : networks) {
      if (network == nullptr) continue;
      const int64_t last = network->per_row() ? item.row_end : item.row_begin + 1;
      for (int64_t row = item.row_begin; row < last; ++row) network->clear(index, item.image, row);
    }
    for (int64_t x0 = 0; x0 < problem.width; x0 += problem.block) {
      const int64_t left = problem.width - x0;
      const int n = left < problem.block ? static_cast<int>(left) : problem.block;
      bool bounded[2] = {true, true};
      for (int i = 0; i < 2; ++i) {
        if (networks[i] != nullptr && !networks[i]->per_row()) {
          bounded[i] = networks[i]->stage(item.image, item.row_begin, x0, n);
        }
      }
      for (int64_t row = item.row_begin; row < item.row_end; ++row) {
        for (int i = 0; i < 2; ++i) {
          if (networks[i] != nullptr && networks[i]->per_row()) bounded[i] = networks[i]->stage(item.image, row, x0, n);
        }
        if (buffers.load(item.image, row, x0, n)) {
          const TileRow<V> student_row = student.row(row), teacher_row = teacher.row(row);
          for (int x = 0; x < n; x += V::kLanes) {
            const Pixels<V> pixels(buffers.labels, buffers.factors, x);
            if (pixels.none_valid()) {
              buffers.record(item.image, row, x0, x, n, V(0), V(0));
            } else {
              on_pixels(item.image, row, x0, x, n, pixels, student_row, teacher_row, bounded[0] && bounded[1], buffers);
            }
          }
          buffers.add_to(problem.partial + 2 * index);
        } else if (problem.maps[0] != nullptr) {
          for (int x = 0; x < n; x += V::kLanes) buffers.record(item.image, row, x0, x, n, V(0), V(0));
        }
        for (Tile<V>* network : networks) {
          if (network != nullptr && network->per_row()) network->flush(index, item.image, row, x0, n);
        }
      }
      for (Tile<V>* network : networks) {
        if (network != nullptr && !network->per_row()) network->flush(index, item.image, item.row_begin, x0, n);
      }
      on_block(index);
    }
  }
}

template <class V>
int64_t walk_bytes(const PixelProblem<typename V::Real>& problem) {
  return Tile<V>::bytes(problem, problem.student) +
         Tile<V>::bytes(problem, problem.has_teacher ? problem.teacher : problem.student) + RowBuffers<V>::bytes(problem);
}

}  // namespace hetero::cpu
