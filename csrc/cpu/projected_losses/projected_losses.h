// HeteroAKD from features (feature resolution, equal grids), from raw memory to terms and gradients.
#pragma once

#include "../pixel_losses/pixel_losses.h"

namespace hetero::cpu {

// A network's features [B, channels, pixels] and projection; outputs are null where they are not wanted.
template <class Real>
struct Features {
  const void* data;
  DType dtype;
  int64_t batch_stride, channel_stride, pixel_stride;
  int64_t channels;
  DType weight_dtype;     // that it came in
  const Real* weight;     // [K, channels]
  const Real* bias;       // [K] or null
  Real* logit_gradient;   // [B, K, pixels]
  Real* weight_gradient;  // [K, channels]
  Real* bias_gradient;    // [K]
};

// `a` describes labels, reduction and terms, at feature resolution; of its student only height and width are looked at,
// which are both networks' grid. Throws std::runtime_error for a wrong label. HakdChoices::kem must not be Kem::kSpatial, whose weights
// need all of an image's logits first.
template <class Real>
void projected_hakd_loss(const LossArguments<Real>& a, const Features<Real>& student, const Features<Real>& teacher,
                         const HakdChoices& choices, const Runtime& runtime);

// gradient [B, channels, pixels] = factor times weight [K, channels] transposed, times logit_gradient [B, K, pixels]. The
// strides are those of channel and pixel; images are channels * pixels apart.
template <class Real>
void project_back(const Real* logit_gradient, const Real* weight, int64_t batch, int64_t classes, int64_t channels,
                  int64_t pixels, double factor, int64_t channel_stride, int64_t pixel_stride, Real* gradient,
                  const Runtime& runtime);

}  // namespace hetero::cpu
