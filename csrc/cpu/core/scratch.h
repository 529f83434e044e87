// Working memory of the loops.
#pragma once

#include <cstdint>

namespace hetero::cpu {

// A thread's working memory, one allocation cut into 64-byte aligned pieces.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* take(int64_t bytes);

 private:
  char* memory_;
  int64_t used_ = 0, size_;
};

// `static`: each instruction set compiles its own.
template <class T>
static inline T* take_array(Scratch& scratch, int64_t count) {
  return static_cast<T*>(scratch.take(count * int64_t(sizeof(T))));
}

}  // namespace hetero::cpu
