// Kernels with a known mistake, or none.
#pragma once

#include <string>

namespace selftest {

// Runs one by name: the sum of what it wrote.
double run(const std::string& name);

}  // namespace selftest
