// The loops of the instruction set that runs now.
#pragma once

#include <type_traits>

#include "../core/dispatch.h"
#include "projected_problem.h"

namespace hetero::cpu {

template <class Real>
const ProjectedKernels<Real>& projected_kernels() {
  if constexpr (std::is_same_v<Real, double>) {
    return kDoubleProjectedKernels;
  } else {
#if defined(HK_HAS_X86_KERNELS)
    return select_table(&kAvx512ProjectedKernels, &kAvx2ProjectedKernels, &kPortableProjectedKernels);
#else
    return select_table<ProjectedKernels<float>>(nullptr, nullptr, &kPortableProjectedKernels);
#endif
  }
}

}  // namespace hetero::cpu
