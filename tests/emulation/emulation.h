// Runs a kernel's threads as fibers on the host and watches them. Reported, as exceptions from `run`: barriers that not
// every thread reaches, collectives with lanes that do not take part, races in shared memory between two barriers (of lanes
// of a warp: between two __syncwarp), reads of shared memory that nobody wrote or that a copy is under way to, accesses
// outside arrays and buffers or not aligned, blocks that touch what another one writes, launches with more shared memory than
// was asked for.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order : int { kForward, kReverse, kShuffled };
enum class Collective : int { kNone, kShuffle, kBallot, kSyncWarp, kGather, kHold };

// Inside a kernel.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
int barrier(int vote);  // the number of threads that voted
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int from);
// Every lane's value, for instructions of a whole warp; they stay until all lanes have been to `hold`. Neither orders memory.
const uint64_t* gather(uint64_t value);
void hold();
unsigned char* dynamic_shared_memory();
void observe_shared(const void* base, int count, int index, int size, bool writes);
void observe_global(const void* address, int size, bool writes);
void check_index(int count, int index);
void copy_async(void* to, const void* from, int bytes);  // which land at the wait
void commit_copies();
void wait_for_copies(int pending);
void observe_atomic(const void* address, int size);

// Around kernels.
void set_order(Order order, unsigned seed);
void run(const char* name, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

// Dynamic shared memory that a kernel's blocks may have on a device: 48 KB until more is asked for. The limit is not a
// call's: lowered, it could take from another thread what that has just asked for and not launched yet.
void set_shared_limit(const char* name, const void* kernel, int device, int64_t bytes);
void check_shared_limit(const char* name, const void* kernel, int device, int64_t bytes);
struct SharedLimit {
  std::string name;  // of the kernel
  int device;
  int64_t bytes;
  int asked;  // how often
};
std::vector<SharedLimit> shared_limits();

// Buffers that kernels may touch.
void add_buffer(const std::string& name, const void* base, int64_t bytes, bool writable);
void* allocate(int64_t bytes);  // a buffer between guard zones, filled with NaN
void clear(void* memory, int64_t bytes);
void release_buffers();         // forgets and frees all; throws if a guard zone was written to

struct Traffic {
  int64_t read = 0, written = 0;  // bytes, each word once for every block that touches it
  int64_t launches = 0;
  std::string names;              // of the kernels, in order
  std::map<std::string, std::pair<int64_t, int64_t>> buffers;  // read and written, by the buffers' names
  std::map<std::string, int64_t> loads;                         // how often a thread read, of whatever size
};
Traffic& traffic();

}  // namespace emulation
