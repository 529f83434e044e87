// What the libraries were built with; CMakeLists.txt writes the values.

#pragma once

namespace hetero {

struct BuildFacts {
  const char* torch;               // version of the one built against
  const char* compiler;            // of C++
  const char* cuda;                // version of its compiler; empty: no CUDA library
  const char* cuda_architectures;  // in CMake's notation, parted by spaces
  const char* no_cuda;             // why there is no CUDA library; empty: there is one
};

extern const BuildFacts kBuildFacts;

}  // namespace hetero
