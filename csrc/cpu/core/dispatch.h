// Which of a table of loops runs: that of the instruction set that runs now.
#pragma once

#include <string>

#include "instruction_set.h"

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

}  // namespace hetero::cpu
