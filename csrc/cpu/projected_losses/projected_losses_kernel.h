// HeteroAKD from features, one tile of pixels at a time: projections, pixel loss and the weights' gradient while the tile is
// in cache. What happens at a pixel is in csrc/pixel/. Included by one translation unit per instruction set.
#pragma once

#include <algorithm>

#include "../core/dot_bf16.h"
#include "../pixel_losses/pixel_losses_kernel.h"
#include "projected_problem.h"

namespace hetero::cpu {

constexpr int64_t kChannelBlock = 64;  // channels that are read before they are multiplied

// One network's features, logits and gradients of a tile.
template <class V>
class ProjectedTile {
 public:
  using Real = typename V::Real;
  using Part = typename V::Part;
  static constexpr int64_t kLanes = Part::kLanes;

  ProjectedTile(const Projection<Real>& projection, int64_t classes, Scratch& scratch)
      : projection_(projection),
        classes_(classes),
        logits_(take_array<Real>(scratch, classes * kTile)),
        gradient_(take_array<Real>(scratch, classes * kTile)),
        block_(take_array<Real>(scratch, kChannelBlock * kTile)),
        parts_(take_array<Real>(scratch, projection.weight_pairs ? classes * kTile : 0)),
        row_(take_array<Real>(scratch, kChannelBlock)),
        panels_(take_array<Real>(scratch, (projection.weight_gradient ? padded_channels(projection.channels) : kChannelBlock) * kTile)) {}

  static int64_t bytes(const Projection<Real>& projection, int64_t classes) {
    const int64_t elements =
        3 * classes * kTile + kChannelBlock * (kTile + 1) + (padded_channels(projection.channels) + kChannelBlock) * kTile;
    return elements * int64_t(sizeof(Real)) + 6 * 64;
  }

  bool wants_gradient() const { return projection_.logit_gradient || projection_.weight_gradient || projection_.bias_gradient; }

  // Reads pixels [p0, p0 + n) of an image once: their logits, and their features for `add_weight_gradient`.
  void project(int64_t image, int64_t p0, int n) {
    for (int64_t k = 0; k < classes_; ++k) {
      const Part bias(projection_.bias ? projection_.bias[k] : Real(0));
      for (int64_t x = 0; x < kTile; x += kLanes) bias.store(logits_ + k * kTile + x);
    }
    for (int64_t c0 = 0; c0 < projection_.channels; c0 += kChannelBlock) {
      const int64_t count = std::min(kChannelBlock, projection_.channels - c0);
      Real* panels = panels_ + (projection_.weight_gradient ? c0 * kTile / (projection_.weight_pairs ? 2 : 1) : 0);
      const int64_t offset = image * projection_.batch_stride + c0 * projection_.channel_stride + p0 * projection_.pixel_stride;
      if constexpr (Dots::kAvailable) {
        if (projection_.weight_pairs) {
          project_pairs(offset, c0, count, n, panels);
          continue;
        }
      }
      projection_.pixel_stride == 1 ? read_channels(offset, count, n, panels) : read_pixels(offset, count, n, panels);
      gemm<Part, Real>(classes_, kTile / kLanes, count, {projection_.weight + c0 * classes_, classes_, 1},
                       {block_, kTile, kLanes}, logits_, kTile, kLanes, true);
    }
  }

  bool bounded(Real limit) const {
    MagnitudeBits<Real> largest = 0;
    for (int64_t i = 0; i < classes_ * kTile; ++i) largest = std::max(largest, magnitude_bits(logits_[i]));
    return largest <= magnitude_bits(limit);
  }

  void scale(Real factor) {
    for (int64_t i = 0; i < classes_ * kTile; ++i) logits_[i] *= factor;
  }

  TileRow<V> row(bool gradient) const {
    return {logits_, logits_, gradient_, gradient_, kTile, kTile, V(Real(0)), V(Real(1)), true, gradient, true};
  }

  // Features that are not numbers at pixels that do not count would spoil the sums below, by way of 0 * NaN.
  void forget(const int32_t* labels) {
    if (projection_.weight_gradient == nullptr) return;
    for (int64_t x = 0; x < kTile; ++x) {
      if (labels[x] >= 0) continue;
      if (projection_.weight_pairs) {
        uint16_t* const halves = reinterpret_cast<uint16_t*>(panels_) + x / 2 * 2 * kLanes + x % 2;
        for (int64_t c = 0; c < padded_channels(projection_.channels); ++c) {
          halves[c / kLanes * kTile * kLanes + c % kLanes * 2] = 0;
        }
        continue;
      }
      for (int64_t c = 0; c < padded_channels(projection_.channels); c += kLanes) {
        Part(Real(0)).store(panels_ + c * kTile + x * kLanes);
      }
    }
  }

  void clear_sums(int64_t chunk) const {
    const int64_t padded = padded_channels(projection_.channels);
    if (Real* sums = projection_.weight_gradient) std::fill_n(sums + chunk * classes_ * padded, classes_ * padded, Real(0));
    if (Real* sums = projection_.bias_gradient) std::fill_n(sums + chunk * classes_, classes_, Real(0));
  }

  void add_gradients(int64_t chunk, int64_t image, int64_t pixels, int64_t p0, int n) const {
    const int64_t padded = padded_channels(projection_.channels);
    if constexpr (Dots::kAvailable) {
      if (projection_.weight_pairs && projection_.weight_gradient) add_weight_pairs(chunk);
    }
    if (projection_.weight_gradient && !projection_.weight_pairs) {
      gemm<Part, Real>(classes_, padded / kLanes, kTile, {gradient_, 1, kTile}, {panels_, kLanes, kTile * kLanes},
                       projection_.weight_gradient + chunk * classes_ * padded, padded, kLanes, true);
    }
    for (int64_t k = 0; k < classes_; ++k) {
      const Real* from = gradient_ + k * kTile;
      if (projection_.logit_gradient) std::copy_n(from, n, projection_.logit_gradient + (image * classes_ + k) * pixels + p0);
      if (projection_.bias_gradient) {
        Real sum = 0;
        for (int64_t x = 0; x < kTile; ++x) sum += from[x];
        projection_.bias_gradient[chunk * classes_ + k] += sum;
      }
    }
  }

 private:
  using Dots = Bf16Dots<Part>;

  // Asks for `elements` of the features that are read soon: rows are too short and too far apart for the processor to
  // foresee. An address beyond the features does no harm.
  void prefetch(int64_t offset, int64_t elements) const {
    const int64_t bytes = element_size(projection_.dtype);
    const char* row = static_cast<const char*>(projection_.features) + offset * bytes;
    for (int64_t i = 0; i < elements * bytes; i += 64) __builtin_prefetch(row + i);
  }

  // Features with neighbouring pixels side by side: block_ [channel][pixel] as they are, panels [channels / lanes][pixel]
  // [lane] by transposition.
  void read_channels(int64_t offset, int64_t count, int n, Real* panels) {
    MagnitudeBits<Real> unused = 0;
    for (int64_t c = 0; c < count; ++c) {
      Real* line = block_ + c * kTile;
      const int64_t from = offset + c * projection_.channel_stride;
      prefetch(from + 8 * projection_.channel_stride, n);
      load_logits(projection_.features, projection_.dtype, from, 1, n, Real(1), line, unused);
      std::fill(line + n, line + kTile, Real(0));
    }
    if (projection_.weight_gradient == nullptr) return;
    const int64_t whole = round_up(count, kLanes);
    std::fill(block_ + count * kTile, block_ + whole * kTile, Real(0));
    for (int64_t c = 0; c < whole; c += kLanes) {
      for (int64_t x = 0; x < kTile; x += kLanes) {
        transpose(block_ + c * kTile + x, kTile, panels + c * kTile + x * kLanes, kLanes, Part());
      }
    }
  }

  // Reads and multiplies channels [c0, c0 + count) by the dot instruction. block_: their rows and those of pairs of
  // channels; panels: pairs of pixels.
  void project_pairs(int64_t offset, int64_t c0, int64_t count, int n, Real* panels) {
    const uint16_t* features = static_cast<const uint16_t*>(projection_.features);
    uint16_t* const rows = reinterpret_cast<uint16_t*>(block_);
    uint32_t* const words = reinterpret_cast<uint32_t*>(rows + kChannelBlock * kTile);
    const int64_t whole = round_up(count, kLanes);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t from = offset + c * projection_.channel_stride;
      prefetch(from + 8 * projection_.channel_stride, n);
      std::copy_n(features + from, n, rows + c * kTile);
      std::fill(rows + c * kTile + n, rows + (c + 1) * kTile, uint16_t(0));
    }
    std::fill(rows + count * kTile, rows + whole * kTile, uint16_t(0));
    for (int64_t c = 0; c < whole; c += 2) {
      Dots::interleave(rows + c * kTile, rows + (c + 1) * kTile, kTile, words + c / 2 * kTile);
    }
    gemm<Part, Real>(classes_, kTile / kLanes, whole / 2,
                     PairOperand{projection_.weight_pairs + c0 / 2 * classes_, nullptr, classes_, 1},
                     {reinterpret_cast<const Real*>(words), kTile, kLanes}, logits_, kTile, kLanes, true);
    if (projection_.weight_gradient == nullptr) return;
    for (int64_t c = 0; c < whole; c += kLanes) {
      for (int64_t x = 0; x < kTile / 2; x += kLanes) {
        transpose(block_ + (c * kTile / 2 + x), kTile / 2, panels + c * kTile / 2 + x * kLanes, kLanes, Part());
      }
    }
  }

  void add_weight_pairs(int64_t chunk) const {
    const int64_t padded = padded_channels(projection_.channels), count = classes_ * kTile;
    uint16_t* const high = reinterpret_cast<uint16_t*>(parts_);
    Dots::split(gradient_, count, high, high + count);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(high);
    gemm<Part, Real>(classes_, padded / kLanes, kTile / 2, PairOperand{words, words + count / 2, 1, kTile / 2},
                     {panels_, kLanes, kTile / 2 * kLanes}, projection_.weight_gradient + chunk * classes_ * padded, padded,
                     kLanes, true);
  }

  // As read_channels for features with neighbouring channels side by side, or neither.
  void read_pixels(int64_t offset, int64_t count, int n, Real* panels) {
    MagnitudeBits<Real> unused = 0;
    const int64_t whole = round_up(count, kLanes);
    for (int64_t x = 0; x < kTile; ++x) {
      int64_t filled = 0;
      if (x < n) {
        prefetch(offset + x * projection_.pixel_stride + kChannelBlock * projection_.channel_stride, kChannelBlock);
        load_logits(projection_.features, projection_.dtype, offset + x * projection_.pixel_stride, projection_.channel_stride,
                    static_cast<int>(count), Real(1), row_, unused);
        filled = count;
      }
      std::fill(row_ + filled, row_ + whole, Real(0));
      for (int64_t c = 0; c < whole; c += kLanes) Part::load(row_ + c).store(panels + c * kTile + x * kLanes);
    }
    for (int64_t c = 0; c < whole; c += kLanes) {
      for (int64_t x = 0; x < kTile; x += kLanes) {
        transpose(panels + c * kTile + x * kLanes, kLanes, block_ + c * kTile + x, kTile, Part());
      }
    }
  }

  const Projection<Real>& projection_;
  const int64_t classes_;
  Real *const logits_, *const gradient_, *const block_, *const parts_, *const row_, *const panels_;
};

// Chunks [begin, end) of tiles.
template <class V>
void projected_hakd(const ProjectedProblem<typename V::Real>& problem, int64_t begin, int64_t end) {
  using Real = typename V::Real;
  const int64_t classes = problem.pixel.classes, pixels = problem.pixel.height * problem.pixel.width;
  const int64_t per_image = (pixels + kTile - 1) / kTile;
  Scratch scratch(ProjectedTile<V>::bytes(problem.student, classes) + ProjectedTile<V>::bytes(problem.teacher, classes) +
                  RowBuffers<V>::bytes(problem.pixel) + hakd_bytes<V>(classes));
  ProjectedTile<V> student(problem.student, classes, scratch), teacher(problem.teacher, classes, scratch);
  RowBuffers<V> buffers(problem.pixel, scratch);
  const HakdLoop<V> loop = make_hakd_loop<V>(problem.pixel, scratch);
  const bool student_gradient = student.wants_gradient(), teacher_gradient = teacher.wants_gradient();

  loop.specialise(student_gradient || teacher_gradient, [&]<int Power, bool Errors>() {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      student.clear_sums(chunk);
      teacher.clear_sums(chunk);
      const int64_t last = std::min((chunk + 1) * problem.tiles_per_chunk, problem.pixel.batch * per_image);
      for (int64_t tile = chunk * problem.tiles_per_chunk; tile < last; ++tile) {
        const int64_t image = tile / per_image, p0 = tile % per_image * kTile;
        const int n = static_cast<int>(std::min(kTile, pixels - p0));
        student.project(image, p0, n);
        teacher.project(image, p0, n);
        buffers.load_run(image, p0, n);
        const bool bounded = student.bounded(problem.pixel.logit_limit) && teacher.bounded(problem.pixel.logit_limit);
        if (bounded) {
          student.scale(problem.pixel.logit_scale);
          teacher.scale(problem.pixel.logit_scale);
        } else {
          student.forget(buffers.labels);
          teacher.forget(buffers.labels);
        }
        const TileRow<V> student_row = student.row(student_gradient), teacher_row = teacher.row(teacher_gradient);
        for (int x = 0; x < kTile; x += V::kLanes) {
          const Pixels<V> vector(buffers.labels, buffers.factors, x);
          if (vector.none_valid()) {
            buffers.record(image, 0, p0, x, n, V(Real(0)), V(Real(0)));
            student_row.add_nothing(classes, x);
            teacher_row.add_nothing(classes, x);
          } else {
            loop.template pixel<Power, Errors>(image, 0, p0, x, n, vector, student_row, teacher_row, bounded, buffers);
          }
        }
        buffers.add_to(problem.pixel.partial + 2 * chunk);
        if (student_gradient) student.add_gradients(chunk, image, pixels, p0, n);
        if (teacher_gradient) teacher.add_gradients(chunk, image, pixels, p0, n);
      }
    }
  });
}

// Tiles [begin, end) of gradient[c] = factor sum_k weight[k, c] logit_gradient[k].
template <class V>
void project_back(const ProjectBack<typename V::Real>& problem, int64_t begin, int64_t end) {
  using Real = typename V::Real;
  using Part = typename V::Part;
  constexpr int64_t kLanes = Part::kLanes;
  const int64_t per_image = (problem.pixels + kTile - 1) / kTile, classes = problem.classes, channels = problem.channels;
  const int64_t padded = padded_channels(channels);
  const bool channels_last = problem.channel_stride == 1 && problem.pixel_stride != 1;
  Scratch scratch((classes * kTile + std::max(channels, int64_t(1)) * kTile + padded) * int64_t(sizeof(Real)) + 3 * 64);
  Real* lines = take_array<Real>(scratch, classes * kTile);
  Real* part = take_array<Real>(scratch, channels * kTile);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t image = tile / per_image, p0 = tile % per_image * kTile;
    const int64_t n = std::min(kTile, problem.pixels - p0);
    for (int64_t k = 0; k < classes; ++k) {
      const Real* from = problem.logit_gradient + (image * classes + k) * problem.pixels + p0;
      for (int64_t x = 0; x < n; ++x) lines[k * kTile + x] = from[x] * problem.factor;
      std::fill(lines + k * kTile + n, lines + (k + 1) * kTile, Real(0));
    }
    Real* out = problem.gradient + image * channels * problem.pixels;
    if (channels_last && channels % kLanes == 0) {
      gemm<Part, Real>(n, channels / kLanes, classes, {lines, kTile, 1}, {problem.weight, channels, kLanes},
                       out + p0 * channels, channels, kLanes, false);
    } else if (!channels_last && n == kTile) {
      gemm<Part, Real>(channels, kTile / kLanes, classes, {problem.weight, channels, 1}, {lines, kTile, kLanes}, out + p0,
                       problem.pixels, kLanes, false);
    } else {
      gemm<Part, Real>(channels, kTile / kLanes, classes, {problem.weight, channels, 1}, {lines, kTile, kLanes}, part, kTile,
                       kLanes, false);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = 0; x < n; ++x) out[c * problem.channel_stride + (p0 + x) * problem.pixel_stride] = part[c * kTile + x];
      }
    }
  }
}

template <class V>
constexpr ProjectedKernels<typename V::Real> make_projected_kernels() {
  return {projected_hakd<V>, project_back<V>};
}

}  // namespace hetero::cpu
