// Kernels with one mistake each: what the emulation must notice.
#include "selftest.h"

#include <stdexcept>

#include "../../csrc/cuda/core/async.cuh"
#include "../../csrc/cuda/core/value.cuh"
#include "selftest_mma.h"

namespace selftest {

using namespace hetero::cuda;

inline Shared<float> array(int count) { return Shared<float>(reinterpret_cast<float*>(dynamic_shared_memory()), count); }

// Every thread reads its neighbour's value.
inline void correct(float* out) {
  const Shared<float> values = array(64);
  values.set(threadIdx.x, static_cast<float>(threadIdx.x));
  __syncthreads();
  write(out + threadIdx.x, values[(threadIdx.x + 1) % 64]);
}
inline void race(float* out) {
  const Shared<float> values = array(64);
  values.set(threadIdx.x, 0.f);
  __syncthreads();
  const int other = (threadIdx.x + 1) % 64;
  write(out + threadIdx.x, values[other]);
  values.set(threadIdx.x, 1.f);
}
inline void divergent_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}
inline void divergent_vote(float*) {
  if (threadIdx.x != 3) __any_sync(0xffffffffu, 1);
}
inline void exited_lane(float*) {
  if (threadIdx.x == 3) return;
  __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
inline void other_collective(float*) {
  if (threadIdx.x % 2) {
    __any_sync(0xffffffffu, 1);
  } else {
    __shfl_xor_sync(0xffffffffu, 1.f, 1);
  }
}
inline void guard_zone(float* out) { out[64] = 0.f; }
inline void wild_write(float* out) { out[130] = 0.f; }  // past the guard zone
inline void unwritten(float* out) { write(out + threadIdx.x, array(64)[threadIdx.x]); }
inline void beyond_array(float*) { array(64).set(threadIdx.x + 1, 0.f); }
inline void beyond_memory(float*) { array(65).set(64, 0.f); }
inline void beyond_buffer(float* out) { write(out + threadIdx.x + 1, 0.f); }
inline void misaligned(float* out) { read_wide(out + 1 + threadIdx.x % 8 * 4); }
inline void meeting_blocks(float* out) { write(out + threadIdx.x, 0.f); }
inline void shuffles(float* out) {
  const float x = static_cast<float>(threadIdx.x), y = __shfl_xor_sync(0xffffffffu, x, 5), z = __shfl_down_sync(0xffffffffu, x, 3);
  const unsigned even = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 0);
  const bool right = y == static_cast<float>(threadIdx.x ^ 5) && z == (threadIdx.x % 32 < 29 ? x + 3 : x) && even == 0x55555555u &&
                     __syncthreads_count(threadIdx.x < 7) == 7 && __shfl_sync(0xffffffffu, x, 9) == static_cast<float>(threadIdx.x / 32 * 32 + 9);
  write(out + threadIdx.x, right ? 1.f : 0.f);
}

// Threads copy 16 bytes or 4 to shared memory behind the kernel's back, and read their neighbours'.
inline void copy_neighbours(float* out, bool wait) {
  const Shared<float> values = array(64);
  if (threadIdx.x < 8) copy_async(values, 4 * threadIdx.x, out + 4 * threadIdx.x);
  if (threadIdx.x >= 32) copy_async<4>(values, threadIdx.x, out + threadIdx.x);
  commit_copies();
  if (wait) wait_for_copies<0>();
  __syncthreads();
  const float x = values[(threadIdx.x + 1) % 64];
  __syncthreads();
  write(out + threadIdx.x, x + 1.f);
}
inline void copies(float* out) { copy_neighbours(out, true); }
inline void early_copy(float* out) { copy_neighbours(out, false); }

// Lanes of a warp exchange values through shared memory.
enum class Between { kNothing, kShuffle, kSyncWarp };
inline void exchange_in_warps(float* out, Between between) {
  const Shared<float> values = array(64);
  values.set(threadIdx.x, static_cast<float>(threadIdx.x));
  if (between == Between::kSyncWarp) __syncwarp();
  if (between == Between::kShuffle) __shfl_xor_sync(0xffffffffu, 1.f, 1);
  write(out + threadIdx.x, values[threadIdx.x ^ 1] == static_cast<float>(threadIdx.x ^ 1) ? 1.f : 0.f);
}
inline void warps(float* out) { exchange_in_warps(out, Between::kSyncWarp); }
inline void warp_race(float* out) { exchange_in_warps(out, Between::kNothing); }
inline void shuffles_order_nothing(float* out) { exchange_in_warps(out, Between::kShuffle); }

// A copy to where others may still read.
inline void copy_too_early(float* out) {
  const Shared<float> values = array(64);
  values.set(threadIdx.x, 0.f);
  __syncthreads();
  write(out + threadIdx.x, values[(threadIdx.x + 32) % 64]);
  __any_sync(0xffffffffu, 1);  // so that the readers come first
  if (threadIdx.x == 63 || threadIdx.x == 0) copy_async(values, threadIdx.x ? 0 : 60, out);
}

// Shared memory beyond 48 KB that was not asked for, or less than another thread has asked for.
inline void limits(bool lower) {
  static const char kernel = 0;
  emulation::set_shared_limit("selftest", &kernel, 0, 50000);
  if (lower) return emulation::set_shared_limit("selftest", &kernel, 0, 49999);
  emulation::check_shared_limit("selftest", &kernel, 0, 50000);
  emulation::check_shared_limit("selftest", &kernel, 1, 50000);
}

std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c) {
  std::vector<float> out(c);
  emulation::run("multiply", 1, 32, 0, [&] {
    const int lane = emulation::lane();
    FragmentA left;
    FragmentB right;
    FragmentC sum;
    for (int i = 0; i < 4; ++i) left.x[i] = to_tf32(a[4 * lane + i]);
    for (int i = 0; i < 2; ++i) right.x[i] = to_tf32(b[2 * lane + i]);
    for (int i = 0; i < 4; ++i) sum.x[i] = c[4 * lane + i];
    multiply_tf32(sum, left, right);
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = sum.x[i];
  });
  return out;
}

// Neighbours that share a sector and lie on different banks, and columns of eight that have a bank and a sector each.
inline void strided(float* out) {
  const Shared<float> values = array(64 * 8);
  values.set(threadIdx.x, read(out + threadIdx.x));
  __syncthreads();
  values.set(threadIdx.x * 8, read(out + threadIdx.x % 8 * 8));
}

// The hardware's 2^x and 1 / x take subnormal numbers for 0 and make 0 of them; the smallest that are none they leave.
inline void subnormals(float* out) {
  namespace hardware = approximate;
  const float least = 0x1p-126f, below = 0x1p-127f;
  const bool given = hardware::reciprocal(below) == INFINITY && hardware::reciprocal(-below) == -INFINITY && hardware::exp2(-below) == 1.f;
  const bool made = hardware::exp2(-126.5f) == 0.f && hardware::reciprocal(0x1.8p126f) == 0.f && std::signbit(hardware::reciprocal(-0x1.8p126f));
  const bool others = hardware::exp2(-125.5f) > least && hardware::reciprocal(0x1p125f) > least && hardware::reciprocal(2 * least) < INFINITY;
  write(out + threadIdx.x, given && made && others ? 1.f : 0.f);
}

double run(const std::string& name) {
  const auto start = [&](void (*kernel)(float*), int blocks = 1, int64_t shared_bytes = 64 * 4) {
    float* out = static_cast<float*>(emulation::allocate(64 * 4));
    emulation::clear(out, 64 * 4);
    double sum = 0;
    try {
      emulation::run("selftest", blocks, 64, shared_bytes, [&] { kernel(out); });
      for (int i = 0; i < 64; ++i) sum += out[i];
    } catch (...) {
      emulation::release_buffers();
      throw;
    }
    emulation::release_buffers();
    return sum;
  };
  if (name == "correct") return start(correct);
  if (name == "strided") return start(strided, 1, 64 * 8 * 4);
  if (name == "race") return start(race);
  if (name == "divergent_barrier") return start(divergent_barrier);
  if (name == "divergent_vote") return start(divergent_vote);
  if (name == "exited_lane") return start(exited_lane);
  if (name == "other_collective") return start(other_collective);
  if (name == "unwritten") return start(unwritten);
  if (name == "beyond_array") return start(beyond_array);
  if (name == "beyond_memory") return start(beyond_memory);
  if (name == "beyond_buffer") return start(beyond_buffer);
  if (name == "misaligned") return start(misaligned);
  if (name == "guard_zone") return start(guard_zone);
  if (name == "shuffles") return start(shuffles);
  if (name == "wild_write") return start(wild_write);
  if (name == "products") return start(products);
  if (name == "special_factors") return start(special_factors<true>);
  if (name == "unconverted_factors") return start(special_factors<false>);
  if (name == "subnormals") return start(subnormals);
  if (name == "conversions") return start(conversions);
  if (name == "unasked_shared") limits(false);
  if (name == "lowered_limit") limits(true);
  if (name == "copies") return start(copies);
  if (name == "early_copy") return start(early_copy);
  if (name == "warps") return start(warps);
  if (name == "warp_race") return start(warp_race);
  if (name == "shuffles_order_nothing") return start(shuffles_order_nothing);
  if (name == "copy_too_early") return start(copy_too_early);
  if (name == "meeting_blocks") return start(meeting_blocks, 2);
  throw std::invalid_argument("no kernel is called " + name);
}

}  // namespace selftest
