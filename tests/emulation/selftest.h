// Kernels with a known mistake, or none.
#pragma once

#include <string>
#include <vector>

namespace selftest {

// Runs one by name: the sum of what it wrote.
double run(const std::string& name);

// What one warp makes of fragments of A, B and C: 32 lanes' 4, 2 and 4 registers.
std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c);

}  // namespace selftest
