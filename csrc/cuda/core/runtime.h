// What a call needs of its surroundings: a card, a stream and memory. Plain C++, no CUDA.
#pragma once

#include <cstdint>
#include <functional>

namespace hetero::cuda {

struct Card {
  int multiprocessors = 132;
  int64_t shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10;  // bytes
  int threads_per_multiprocessor = 2048;
};

// What a call needs of its surroundings: memory that lives until the work on `stream` is done, the card, and which one it is.
struct Runtime {
  std::function<void*(int64_t bytes)> allocate;
  void* stream;
  Card card;
  int device;
};

Card card_of(int device);

// Bytes that an array takes of a block's shared memory (SharedAllocator).
constexpr int64_t array_bytes(int64_t count, int64_t size) { return (count * size + 15) / 16 * 16; }

}  // namespace hetero::cuda
