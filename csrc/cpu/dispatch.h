// The loops of the instruction set that runs now.
#pragma once

#include <string>
#include <type_traits>

#include "instruction_set.h"
#include "problem.h"
#include "projected_problem.h"

namespace hetero::cpu {

// Whether bfloat16 numbers may be multiplied by the machine's dot instruction.
inline bool bf16_dots() { return active_instruction_set() == "avx512_bf16"; }

// One of four tables of the same loops; float64 has one for all machines. "avx512_bf16" has that of "avx512".
template <class Table>
const Table& select_table(const Table* avx512, const Table* avx2, const Table* portable) {
  const std::string active = active_instruction_set();
  if (active.starts_with("avx512") && avx512 != nullptr) return *avx512;
  if (active == "avx2" && avx2 != nullptr) return *avx2;
  return *portable;
}

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
