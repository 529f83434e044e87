// Numbers too small for a full mantissa.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace hetero::cpu {

// While it lives this thread's results below the smallest normal number (float32: 1.2e-38) are 0. Each such result costs an Intel
// processor some 150 cycles, and the exponentials of a sure network's logits are full of them. Subnormal inputs stay what they are:
// float16 is read by way of them.
class FlushSubnormals {
#if defined(__SSE__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#else
 public:
  FlushSubnormals() {}  // elsewhere they cost nothing; written down, so that a variable of this type counts as used
#endif
};

}  // namespace hetero::cpu
