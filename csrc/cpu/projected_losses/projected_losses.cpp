#include "projected_losses.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../core/large_pages.h"
#include "../pixel_losses/feature_grid.h"
#include "../pixel_losses/reduction.h"
#include "dispatch.h"

namespace hetero::cpu {

namespace {

constexpr int64_t kMaxChunks = 32;  // bounds the memory of the weights' gradient slots

// One network's view for the loop, with the memory that it needs.
template <class Real>
class BoundProjection {
 public:
  BoundProjection(const Features<Real>& f, int64_t classes, int64_t chunks, const Runtime& runtime)
      : features_(f), classes_(classes), chunks_(chunks), transposed_(f.channels * classes) {
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t c = 0; c < f.channels; ++c) transposed_[c * classes + k] = f.weight[k * f.channels + c];
    }
    const auto slots = [&](bool wanted, int64_t size) {
      return wanted ? static_cast<Real*>(runtime.allocate(chunks * size * int64_t(sizeof(Real)))) : nullptr;
    };
    view = {f.data, f.dtype, f.batch_stride, f.channel_stride, f.pixel_stride, f.channels, transposed_.data(), nullptr, f.bias,
            f.logit_gradient, slots(f.weight_gradient, classes * padded_channels(f.channels)), slots(f.bias_gradient, classes)};
    const bool exact = f.dtype == DType::kBFloat16 && f.weight_dtype == DType::kBFloat16;
    if (std::is_same_v<Real, float> && exact && f.pixel_stride == 1 && bf16_dots()) pair_weight();
  }

  // Adds up the chunks, in order.
  void gather(const Runtime& runtime) const {
    const int64_t channels = features_.channels, padded = padded_channels(channels);
    runtime.parallel(classes_, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (features_.weight_gradient) {
          Real* out = features_.weight_gradient + k * channels;
          std::fill_n(out, channels, Real(0));
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const Real* part = view.weight_gradient + (chunk * classes_ + k) * padded;
            for (int64_t c = 0; c < channels; ++c) out[c] += part[c];
          }
        }
        if (features_.bias_gradient) {
          double sum = 0;
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += view.bias_gradient[chunk * classes_ + k];
          features_.bias_gradient[k] = static_cast<Real>(sum);
        }
      }
    });
  }

  Projection<Real> view;

 private:
  // Both are the upper halves of float32.
  void pair_weight() {
    pairs_.resize(padded_channels(features_.channels) / 2 * classes_);
    for (int64_t c = 0; c < features_.channels; ++c) {
      for (int64_t k = 0; k < classes_; ++k) {
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(transposed_[c * classes_ + k]));
        pairs_[c / 2 * classes_ + k] |= c % 2 == 0 ? bits >> 16 : bits & 0xffff0000u;
      }
    }
    view.weight_pairs = pairs_.data();
  }

  const Features<Real>& features_;
  const int64_t classes_, chunks_;
  std::vector<Real> transposed_;
  std::vector<uint32_t> pairs_;
};

// Gradients that are zero, and need not be computed.
template <class Real>
void set_zero(Features<Real>& f, int64_t pixels, int64_t classes) {
  if (f.logit_gradient) std::fill_n(f.logit_gradient, pixels * classes, Real(0));
  if (f.weight_gradient) std::fill_n(f.weight_gradient, classes * f.channels, Real(0));
  if (f.bias_gradient) std::fill_n(f.bias_gradient, classes, Real(0));
  f.logit_gradient = f.weight_gradient = f.bias_gradient = nullptr;
}

}  // namespace

template <class Real>
void projected_hakd_loss(const LossArguments<Real>& arguments, const Features<Real>& student, const Features<Real>& teacher_features,
                         const HakdChoices& choices, const Runtime& runtime) {
  Features<Real> teacher = teacher_features;
  const FeatureGrid<Real> feature(arguments, runtime);
  const LossArguments<Real>& a = feature.arguments;
  const LossGrid<Real> grid(a);
  const int64_t pixels = grid.height * grid.width;
  const int64_t tiles = a.batch * ((pixels + kTile - 1) / kTile);
  const int64_t tiles_per_chunk = std::max<int64_t>(1, (tiles + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (tiles + tiles_per_chunk - 1) / tiles_per_chunk;
  std::vector<double> partial(chunks * 2, 0.0);

  ProjectedProblem<Real> problem{};
  HakdProblem<Real>& pixel = problem.pixel;
  grid.describe(a, partial, pixel);
  pixel.has_teacher = true;
  pixel.block = kTile;
  pixel.parameters = {static_cast<Real>(a.temperature), choices.kmm, choices.kem, choices.cross_entropy};
  problem.tiles_per_chunk = tiles_per_chunk;

  const double valid = static_cast<double>(feature.valid);
  const LossReduction<Real> reduction(a, {valid, valid}, pixel);
  if (pixel.coefficient[1] == 0) set_zero(teacher, a.batch * pixels, a.classes);  // L_proj is its only source of gradients
  BoundProjection<Real> bound_student(student, a.classes, chunks, runtime), bound_teacher(teacher, a.classes, chunks, runtime);
  problem.student = bound_student.view;
  problem.teacher = bound_teacher.view;
  runtime.parallel(chunks, [&](int64_t begin, int64_t end) { projected_kernels<Real>().hakd(problem, begin, end); });
  bound_student.gather(runtime);
  bound_teacher.gather(runtime);
  reduction.finish(partial, a.batch * pixels, runtime);
}

template <class Real>
void project_back(const Real* logit_gradient, const Real* weight, int64_t batch, int64_t classes, int64_t channels,
                  int64_t pixels, double factor, int64_t channel_stride, int64_t pixel_stride, Real* gradient,
                  const Runtime& runtime) {
  const ProjectBack<Real> problem{pixels, classes, channels, logit_gradient, weight, static_cast<Real>(factor), gradient,
                                  channel_stride, pixel_stride};
  prefer_large_pages(gradient, batch * channels * pixels * int64_t(sizeof(Real)), runtime);
  const int64_t tiles = batch * ((pixels + kTile - 1) / kTile);
  runtime.parallel(tiles, [&](int64_t begin, int64_t end) { projected_kernels<Real>().project_back(problem, begin, end); });
}

template void projected_hakd_loss(const LossArguments<float>&, const Features<float>&, const Features<float>&,
                                  const HakdChoices&, const Runtime&);
template void projected_hakd_loss(const LossArguments<double>&, const Features<double>&, const Features<double>&,
                                  const HakdChoices&, const Runtime&);
template void project_back(const float*, const float*, int64_t, int64_t, int64_t, int64_t, double, int64_t, int64_t, float*,
                           const Runtime&);
template void project_back(const double*, const double*, int64_t, int64_t, int64_t, int64_t, double, int64_t, int64_t,
                           double*, const Runtime&);

}  // namespace hetero::cpu
