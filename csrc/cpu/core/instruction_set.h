// Which instruction set's loops run: the best that the machine has, or the one that HETERO_KERNELS_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace hetero::cpu {

// Names of those this machine runs and this build contains, best first; "portable" is always the last.
std::vector<std::string> instruction_sets();

// The one that runs now. Reads the variable at every call; throws std::runtime_error if it names one that cannot run.
std::string active_instruction_set();

}  // namespace hetero::cpu
