// The walk over the loss grid that every loss shares: items, blocks of columns, rows, vectors of pixels.
#pragma once

#include <optional>

#include "label_rows.h"
#include "tile.h"

namespace hetero::cpu {

// One class per pixel of a vector: the label or the anchor; -1 for none.
template <class V>
struct ClassPerPixel {
  const int32_t* classes;
  int lowest, highest;

  explicit ClassPerPixel(const int32_t* per_pixel) : classes(per_pixel) {
    uint32_t low = INT32_MAX;
    int32_t high = -1;
    for (int i = 0; i < V::kLanes; ++i) {
      const uint32_t k = static_cast<uint32_t>(classes[i]);  // -1 is the highest
      low = k < low ? k : low;
      high = classes[i] > high ? classes[i] : high;
    }
    lowest = static_cast<int>(low);
    highest = high;
  }

  HK_INLINE Chosen<V> at(int64_t c) const { return {equals(classes, static_cast<int32_t>(c), V())}; }

  // use(c, Chosen or NotChosen) for classes [begin, end).
  template <class Use>
  HK_INLINE void each(int64_t begin, int64_t end, Use use) const {
    const int64_t first = lowest < begin ? begin : lowest > end ? end : lowest;
    const int64_t last = highest + 1 < first ? first : highest + 1 > end ? end : highest + 1;
    for (int64_t c = begin; c < first; ++c) use(c, NotChosen<V>());
    for (int64_t c = first; c < last; ++c) use(c, at(c));
    for (int64_t c = last; c < end; ++c) use(c, NotChosen<V>());
  }

  // The value that each pixel has at its class.
  template <class Value>
  V pick(Value value) const {
    V found(typename V::Real(0));
    for (int k = lowest; k <= highest; ++k) {
      found = select(equals(classes, k, V()), value(k), found);
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
        factors(static_cast<Real*>(scratch.take(int64_t(problem.block) * sizeof(Real)))) {
    for (int x = 0; x < problem_.block; ++x) factors[x] = 1;
  }

  static int64_t bytes(const PixelProblem<Real>& problem) { return int64_t(problem.block) * (4 + sizeof(Real)) + 128; }

  // Pixels [x0, x0 + n) of a row.
  void load(int64_t image, int64_t row, int64_t x0, int n) {
    load_part(image, row, x0, n, 0);
    close(n);
  }

  // Pixels [p0, p0 + n) of an image, rows counted through.
  void load_run(int64_t image, int64_t p0, int n) {
    for (int at = 0; at < n;) {
      const int64_t row = (p0 + at) / problem_.width, x0 = (p0 + at) % problem_.width, left = problem_.width - x0;
      const int count = left < n - at ? static_cast<int>(left) : n - at;
      load_part(image, row, x0, count, at);
      at += count;
    }
    close(n);
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
  void load_part(int64_t image, int64_t row, int64_t x0, int n, int at) {
    load_labels(problem_, image, row, x0, n, labels + at);
    if (const Real* upstream = problem_.upstream) {
      upstream += image * problem_.upstream_stride[0] + row * problem_.upstream_stride[1];
      for (int x = 0; x < n; ++x) factors[at + x] = upstream[(x0 + x) * problem_.upstream_stride[2]];
    }
  }

  // Beyond the n pixels that were loaded nothing counts.
  void close(int n) {
    for (int x = n; x < problem_.block; ++x) labels[x] = -1;
    if (problem_.upstream != nullptr) {
      for (int x = n; x < problem_.block; ++x) factors[x] = 0;
    }
    sums_[0] = sums_[1] = V(Real(0));
  }

  const PixelProblem<Real>& problem_;
  V sums_[2];

 public:
  int32_t* const labels;
  Real* const factors;
};

// Walks items [begin, end): `on_pixels(image, row, x0, x, n, Pixels, student row, teacher row, bounded, buffers)` for every
// vector with a pixel that counts; `on_block(item)` after every block. The teacher's row is empty where there is none.
template <class V, class OnPixels, class OnBlock>
void walk(const PixelProblem<typename V::Real>& problem, Scratch& scratch, int64_t begin, int64_t end, OnPixels on_pixels,
          OnBlock on_block) {
  using Real = typename V::Real;
  RowBuffers<V> buffers(problem, scratch);
  Tile<V> student(problem.student, problem, scratch);
  std::optional<Tile<V>> teacher;
  if (problem.has_teacher) teacher.emplace(problem.teacher, problem, scratch);
  Tile<V>* networks[2] = {&student, teacher ? &*teacher : nullptr};
  const int count = teacher ? 2 : 1;

  for (int64_t index = begin; index < end; ++index) {
    const Item& item = problem.items[index];
    for (int i = 0; i < count; ++i) {
      const int64_t last = networks[i]->per_row() ? item.row_end : item.row_begin + 1;
      for (int64_t row = item.row_begin; row < last; ++row) networks[i]->clear(index, item.image, row);
    }
    for (int64_t x0 = 0; x0 < problem.width; x0 += problem.block) {
      const int64_t left = problem.width - x0;
      const int n = left < problem.block ? static_cast<int>(left) : problem.block;
      for (int i = 0; i < count; ++i) {
        if (!networks[i]->per_row()) networks[i]->stage(item.image, item.row_begin, x0, n);
        networks[i]->clear_gradient();
      }
      for (int64_t row = item.row_begin; row < item.row_end; ++row) {
        bool bounded = true;
        for (int i = 0; i < count; ++i) {
          if (networks[i]->per_row()) networks[i]->stage(item.image, row, x0, n);
          bounded = bounded && networks[i]->bounded();
        }
        for (int i = 0; i < count; ++i) networks[i]->use(!bounded);
        buffers.load(item.image, row, x0, n);
        const TileRow<V> student_row = student.row(row), teacher_row = teacher ? teacher->row(row) : TileRow<V>{};
        for (int x = 0; x < n; x += V::kLanes) {
          const Pixels<V> pixels(buffers.labels, buffers.factors, x);
          if (pixels.none_valid()) {
            buffers.record(item.image, row, x0, x, n, V(Real(0)), V(Real(0)));
            student_row.add_nothing(problem.classes, x);
            teacher_row.add_nothing(problem.classes, x);
          } else {
            on_pixels(item.image, row, x0, x, n, pixels, student_row, teacher_row, bounded, buffers);
          }
        }
        buffers.add_to(problem.partial + 2 * index);
        for (int i = 0; i < count; ++i) {
          if (networks[i]->per_row()) networks[i]->flush(index);
        }
      }
      for (int i = 0; i < count; ++i) {
        if (!networks[i]->per_row()) networks[i]->flush(index);
      }
      on_block(index);
    }
  }
}

template <class V>
int64_t walk_bytes(const PixelProblem<typename V::Real>& problem) {
  return RowBuffers<V>::bytes(problem) + Tile<V>::bytes(problem.student, problem) +
         (problem.has_teacher ? Tile<V>::bytes(problem.teacher, problem) : 0);
}

}  // namespace hetero::cpu
