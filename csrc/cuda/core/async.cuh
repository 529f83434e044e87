// Copies from global to shared memory that go on while the thread does other work (cp.async, sm_80). What was copied is
// there for the thread after `wait_for_copies`, for others after a barrier as well; on the host it lands at the wait.
#pragma once

#include "memory.cuh"

namespace hetero::cuda {

// `Bytes` (16 or 4) from `from` to elements [at, at + Bytes / sizeof(T)) of `to`; both addresses are multiples of Bytes.
template <int Bytes = 16, class T>
HK_ACCESS void copy_async(const Shared<T>& to, int at, const T* from) {
  static_assert(Bytes == 16 || Bytes == 4);
#if defined(HK_EMULATION)
  to.address(at + Bytes / int(sizeof(T)) - 1);  // checks the last one's place, too
  emulation::copy_async(to.address(at), from, Bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to.address(at)));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
  }
#endif
}

// Ends a group of copies.
HK_DEVICE void commit_copies() {
#if defined(HK_EMULATION)
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last `Pending` groups of the thread are under way.
template <int Pending>
HK_DEVICE void wait_for_copies() {
#if defined(HK_EMULATION)
  emulation::wait_for_copies(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// The same for a number that the compiler does not know; above 7 it waits for no fewer than 7.
HK_DEVICE void wait_until(int pending) {
  switch (pending) {
    case 0: return wait_for_copies<0>();
    case 1: return wait_for_copies<1>();
    case 2: return wait_for_copies<2>();
    case 3: return wait_for_copies<3>();
    case 4: return wait_for_copies<4>();
    case 5: return wait_for_copies<5>();
    case 6: return wait_for_copies<6>();
    default: return wait_for_copies<7>();
  }
}

}  // namespace hetero::cuda
