// The loops of the instruction set that runs now.
#pragma once

#include <type_traits>

#include "../core/dispatch.h"
#include "projection_problem.h"

namespace hetero::cpu {

template <class Real>
const ProjectionKernels<Real>& projection_kernels() {
  if constexpr (std::is_same_v<Real, double>) {
    return kDoubleProjectionKernels;
  } else {
#if defined(HK_HAS_X86_KERNELS)
    return select_table(&kAvx512ProjectionKernels, &kAvx2ProjectionKernels, &kPortableProjectionKernels);
#else
    return select_table<ProjectionKernels<float>>(nullptr, nullptr, &kPortableProjectionKernels);
#endif
  }
}

}  // namespace hetero::cpu
