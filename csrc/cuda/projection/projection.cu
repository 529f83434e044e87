// The functions of projection.h.
#include "projection_launch.cuh"

namespace hetero::cuda {

void project(const ProjectionArguments& arguments, float* logits, float* pilot, double* statistics, const Runtime& runtime) {
  project_launches(arguments, logits, pilot, statistics, runtime);
}

void project_weights(const ProjectionArguments& arguments, const LogitGradient& gradient, const float* pilot, float* out,
                     const Runtime& runtime) {
  project_weights_launches(arguments, gradient, pilot, out, runtime);
}

void project_back(const BackArguments& arguments, const Runtime& runtime) { project_back_launch(arguments, runtime); }

}  // namespace hetero::cuda
