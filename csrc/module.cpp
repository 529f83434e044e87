// The host module `hetero_kernels._host`: what the libraries were built with and which CPU instruction set runs. It needs
// no torch, so that it still answers where a library cannot be loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/instruction_set.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "Build facts of hetero_kernels' compiled libraries.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = HK_BUILD_TORCH;
        info["compiler"] = HK_BUILD_COMPILER;
        info["cuda"] = HK_BUILD_CUDA;
        return info;
      },
      "dict: torch the build ran against, the C++ compiler, and the CUDA version (empty: no CUDA library).");
  m.def("instruction_sets", &hetero::cpu::instruction_sets,
        "Instruction sets this machine runs and this build contains, best first.");
  m.def("active_instruction_set", &hetero::cpu::active_instruction_set,
        "The one that runs now; HETERO_KERNELS_CPU_ISA forces one. Raises RuntimeError if that one cannot run.");
}
