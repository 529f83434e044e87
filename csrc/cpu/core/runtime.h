// What a kernel needs from its surroundings: threads and memory. torch's in the extension, anything in a test.
#pragma once

#include <cstdint>
#include <functional>

namespace hetero::cpu {

struct Runtime {
  // Calls body(begin, end) on parts of [0, count) from several threads; body must not throw.
  std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)> parallel;
  // Uninitialised memory that lives until the operator returns.
  std::function<void*(int64_t bytes)> allocate;
};

}  // namespace hetero::cpu
