#include "instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace hetero::cpu {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(HK_HAS_X86_KERNELS)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
    names.push_back("avx512");
  }
  if (fma && __builtin_cpu_supports("avx2")) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

std::string active_instruction_set() {
  static const std::vector<std::string> names = instruction_sets();
  const char* forced = std::getenv("HETERO_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return names.front();
  if (std::find(names.begin(), names.end(), forced) == names.end()) {
    std::string known;
    for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
    throw std::runtime_error("HETERO_KERNELS_CPU_ISA is '" + std::string(forced) + "', this machine and build have: " + known);
  }
  return forced;
}

}  // namespace hetero::cpu
