// Fresh memory that is large: how it is mapped.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "runtime.h"

namespace hetero::cpu {

// Fresh memory of this size costs more to map than to fill: ask for large pages where the system grants them on request.
inline void prefer_large_pages(void* memory, int64_t bytes, const Runtime& runtime) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage);
  const int64_t whole = (static_cast<char*>(memory) + bytes - first) / kPage * kPage;
  if (whole <= 0 || madvise(first, whole, MADV_HUGEPAGE) != 0) return;
  // Each page is touched by one thread only: two that fault at once would both fill it.
  runtime.parallel((whole + kPage - 1) / kPage, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) *static_cast<volatile char*>(first + page * kPage) = 0;
  });
#else
  (void)memory, (void)bytes, (void)runtime;
#endif
}

}  // namespace hetero::cpu
