// The loops of the instruction set that runs now.
#pragma once

#include <type_traits>

#include "../core/dispatch.h"
#include "problem.h"

namespace hetero::cpu {

template <class Real>
const Kernels<Real>& pixel_kernels() {
  if constexpr (std::is_same_v<Real, double>) {
    return kDoubleKernels;
  } else {
#if defined(HK_HAS_X86_KERNELS)
    return select_table(&kAvx512Kernels, &kAvx2Kernels, &kPortableKernels);
#else
    return select_table<Kernels<float>>(nullptr, nullptr, &kPortableKernels);
#endif
  }
}

}  // namespace hetero::cpu
