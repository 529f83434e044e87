// segmentation_loss of pixel_losses.h.
#include "segmentation_launch.cuh"

namespace hetero::cuda {

void segmentation_loss(const Arguments& arguments, const float* class_weight, double label_smoothing, const Runtime& runtime) {
  segmentation_launches(arguments, class_weight, label_smoothing, runtime);
}

}  // namespace hetero::cuda
