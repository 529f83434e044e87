#include "scratch.h"

#include <cstdlib>
#include <new>

namespace hetero::cpu {

Scratch::Scratch(int64_t bytes) : size_((bytes + 63) / 64 * 64) {
  memory_ = static_cast<char*>(::operator new(size_, std::align_val_t(64)));
}
Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
void* Scratch::take(int64_t bytes) {
  void* piece = memory_ + used_;
  used_ += (bytes + 63) / 64 * 64;
  if (used_ > size_) std::abort();  // a bytes() bound is wrong: no way on from here
  return piece;
}

}  // namespace hetero::cpu
