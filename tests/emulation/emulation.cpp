#include "emulation.h"
#include "accesses.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace emulation {

namespace {

enum class State : int { kReady, kBarrier, kCollective, kDone };

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

struct Thread {
  State state = State::kReady;
  int vote = 0;
  Collective kind = Collective::kNone;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int from = 0;
  int64_t meetings = 0;  // barriers and collectives
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
};

constexpr int kGrain = 2;  // bytes of shared memory that are watched together: the smallest element that kernels keep there

// When something happened to shared memory: epochs between barriers, and between the __syncwarp of the thread's warp.
struct Moment {
  int epoch = -1, warp_epoch = -1;
};

// Who touched a grain of shared memory last, and when: thread + 1, 0 for nobody; kSeveral + warp for lanes of one warp, kAll
// for threads of several.
constexpr int kSeveral = 1 << 20, kAll = 1 << 21;
struct Grain {
  int writer = 0, reader = 0;
  Moment written, read;
  bool copying = false;  // an asynchronous copy to it is under way
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
  std::string name;
  const char* base;
  int64_t bytes;
  bool writable;
  std::unique_ptr<char, Free> memory;  // of allocated ones, with the guard zones
  std::vector<int32_t> reader, writer;  // of every word: stamp of the block that touched it last, 0 for none
  int64_t bytes_read = 0, bytes_written = 0, loads = 0;
};

// Lanes in a collective, and those that have exited.
struct Warp {
  unsigned waiting = 0, exited = 0;
};

constexpr int64_t kWatched = 256 << 20;  // larger buffers are checked for their bounds alone
constexpr int64_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5, kPoison = 0xff;  // four poison bytes are a NaN

struct Machine {
  Order order = Order::kForward;
  unsigned seed = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> warp_epochs;
  std::vector<std::array<uint64_t, 32>> gathered;  // by warp
  std::vector<Grain> grains;
  std::vector<unsigned char> shared;
  std::vector<Buffer> buffers;
  size_t last_buffer = 0;
  const std::function<void()>* kernel = nullptr;
  const char* name = "";
  int current = 0, epoch = 0, votes = 0;
  int64_t block = 0, blocks = 0;
  int32_t stamp = 0, first_stamp = 0;  // of the running block, and of its launch's first
  std::string failure;
  Traffic traffic;
  Fibers fibers;
};
Machine machine;

[[noreturn]] void fail(const std::string& what) {
  machine.failure = std::string(machine.name) + ", block " + std::to_string(machine.block) + ", thread " +
                    std::to_string(machine.current) + ", epoch " + std::to_string(machine.epoch) + ": " + what;
  machine.threads[machine.current].state = State::kDone;
  machine.fibers.suspend();  // never comes back
  std::abort();
}

Thread& self() { return machine.threads[machine.current]; }

void wait(State state) {
  self().state = state;
  machine.fibers.suspend();
}

// Completes a collective when all of its lanes are there; until then each that comes is compared with one that waits.
void try_collective(int thread) {
  const int first = thread / 32 * 32, lanes = static_cast<int>(machine.threads.size()) - first;
  const Thread& mine = machine.threads[thread];
  const unsigned mask = mine.mask;
  Warp& warp = machine.warps[thread / 32];
  if (lanes < 32 && mask >> lanes) fail("a collective's mask names a lane that does not exist");
  if (const unsigned gone = mask & warp.exited) {
    fail("a collective waits for lane " + std::to_string(__builtin_ctz(gone)) + ", which has exited");
  }
  const auto compare = [&](int lane) {
    const Thread& t = machine.threads[first + lane];
    if (t.mask != mask || t.kind != mine.kind) fail("lane " + std::to_string(lane) + " is in another collective, or has another mask");
  };
  if (const unsigned others = mask & warp.waiting) compare(__builtin_ctz(others));
  warp.waiting |= 1u << (thread - first);
  if ((warp.waiting & mask) != mask) return;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) compare(lane);
  }
  warp.waiting &= ~mask;
  if (machine.threads[thread].kind == Collective::kSyncWarp) ++machine.warp_epochs[thread / 32];
  uint64_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) ballot |= machine.threads[first + lane].value << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& t = machine.threads[first + lane];
    if (t.kind == Collective::kShuffle) {
      if (!(mask >> t.from & 1)) fail("lane " + std::to_string(lane) + " reads a lane outside the mask");
      t.result = machine.threads[first + t.from].value;
    } else if (t.kind == Collective::kGather) {
      machine.gathered[thread / 32][lane] = t.value;
    } else {
      t.result = static_cast<unsigned>(ballot);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) machine.threads[first + lane].state = State::kReady;
  }
}

void body() {
  (*machine.kernel)();
  self().state = State::kDone;
  machine.warps[machine.current / 32].exited |= 1u << machine.current % 32;
}

void run_block(int threads, std::mt19937& random) {
  machine.threads.assign(threads, Thread{});
  machine.grains.assign((machine.shared.size() + kGrain - 1) / kGrain, Grain{});
  std::fill(machine.shared.begin(), machine.shared.end(), kPoison);
  machine.epoch = 0;
  machine.warps.assign((threads + 31) / 32, Warp{});
  machine.warp_epochs.assign((threads + 31) / 32, 0);
  machine.gathered.resize((threads + 31) / 32);
  machine.fibers.prepare(threads, &body);
  std::vector<int> sequence(threads);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (machine.order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
  for (;;) {
    if (machine.order == Order::kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
    bool ran = false;
    for (int thread : sequence) {
      if (machine.threads[thread].state != State::kReady) continue;
      machine.current = thread;
      machine.fibers.resume(thread);
      if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
      ran = true;
    }
    if (ran) continue;
    int waiting = 0, done = 0;
    machine.votes = 0;
    for (const Thread& t : machine.threads) {
      waiting += t.state == State::kBarrier;
      done += t.state == State::kDone;
      machine.votes += t.vote;
    }
    if (done == threads) return end_accesses(machine.name);
    const std::string where = std::string(machine.name) + ", block " + std::to_string(machine.block) + ": ";
    if (waiting != threads) {
      throw std::runtime_error(where + "barrier divergence: " + std::to_string(waiting) + " threads wait, " +
                               std::to_string(done) + " have exited, of " + std::to_string(threads));
    }
    ++machine.epoch;
    for (Thread& t : machine.threads) t.state = State::kReady;
  }
}

Buffer* find(const void* address, int size) {
  const char* at = static_cast<const char*>(address);
  const auto holds = [&](const Buffer& b) { return at >= b.base && at + size <= b.base + b.bytes; };
  if (machine.last_buffer < machine.buffers.size() && holds(machine.buffers[machine.last_buffer])) {
    return &machine.buffers[machine.last_buffer];
  }
  for (size_t i = 0; i < machine.buffers.size(); ++i) {
    if (holds(machine.buffers[i])) {
      machine.last_buffer = i;
      return &machine.buffers[i];
    }
  }
  return nullptr;
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(machine.current)}; }
Index block_index() { return {static_cast<unsigned>(machine.block)}; }
Index block_size() { return {static_cast<unsigned>(machine.threads.size()), 1, 1}; }
Index grid_size() { return {static_cast<unsigned>(machine.blocks), 1, 1}; }
unsigned char* dynamic_shared_memory() { return machine.shared.data(); }

int barrier(int vote) {
  ++self().meetings;
  self().vote = vote;
  wait(State::kBarrier);
  return machine.votes;
}

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int from) {
  Thread& t = self();
  ++t.meetings;
  if (!(mask >> (machine.current % 32) & 1)) fail("a lane is not in the mask of its collective");
  t.kind = kind;
  t.mask = mask;
  t.value = value;
  t.from = from;
  t.state = State::kCollective;
  try_collective(machine.current);
  if (t.state == State::kCollective) machine.fibers.suspend();
  return t.result;
}

const uint64_t* gather(uint64_t value) {
  collective(Collective::kGather, 0xffffffffu, value, 0);
  return machine.gathered[machine.current / 32].data();
}

void hold() { collective(Collective::kHold, 0xffffffffu, 0, 0); }

void check_index(int count, int index) {
  if (index < 0 || index >= count) fail("index " + std::to_string(index) + " of a shared array of " + std::to_string(count));
}

// Whether an access then, by a thread, a warp's lanes or several (as in Grain), may meet one of this thread now.
bool unordered(int who, const Moment& then) {
  const int me = machine.current + 1, warp = machine.current / 32;
  if (then.epoch != machine.epoch || who == me) return false;
  const bool of_my_warp = who == kSeveral + warp || (who <= kSeveral - 1 && (who - 1) / 32 == warp);
  return !(of_my_warp && then.warp_epoch < machine.warp_epochs[warp]);
}

std::string thread_name(int who) {
  return who >= kAll ? "several threads" : who >= kSeveral ? "warp " + std::to_string(who - kSeveral) : "thread " + std::to_string(who - 1);
}

// An access to bytes of shared memory; `copying`: what becomes of an asynchronous copy to them.
void observe_bytes(int64_t offset, int size, bool writes, bool copying = false, bool lands = false) {
  if (offset < 0 || offset + size > static_cast<int64_t>(machine.shared.size())) fail("an array beyond the block's shared memory");
  const int me = machine.current + 1, warp = machine.current / 32;
  const Moment now{machine.epoch, machine.warp_epochs[warp]};
  for (int64_t w = offset / kGrain; w <= (offset + size - 1) / kGrain; ++w) {
    Grain& grain = machine.grains[w];
    const auto where = [w] { return "shared byte " + std::to_string(w * kGrain); };  // not made at every access
    if (grain.copying && !lands) fail(where() + " is touched while a copy to it is under way");
    const bool written_now = unordered(grain.writer, grain.written), read_now = unordered(grain.reader, grain.read);
    if (written_now || (writes && read_now)) {
      fail("race on " + where() + ": " + thread_name(written_now ? grain.writer : grain.reader) + (written_now ? " wrote" : " read") +
           " and this one " + (writes ? "writes" : "reads") + " between two barriers");
    }
    grain.copying = copying;
    if (writes) {
      grain.writer = me;
      grain.written = now;
    } else {
      if (grain.writer == 0) fail(where() + " is read but was never written");
      const bool others = grain.read.epoch == now.epoch && grain.reader != me && grain.reader != 0;
      const bool same_warp = grain.reader == kSeveral + warp || (grain.reader < kSeveral && (grain.reader - 1) / 32 == warp);
      grain.reader = !others ? me : same_warp ? kSeveral + warp : kAll;
      grain.read = now;
    }
  }
}

// For banks and sectors, of the instruction behind `site`.
void count_by_site(const void* site, int64_t address, int size, bool shared, bool writes) {
  if (counts_accesses()) count_access({site, machine.current, self().meetings, address, size, shared, writes});
}

void observe_shared(const void* base, int count, int index, int size, bool writes) {
  check_index(count, index);
  const int64_t offset = static_cast<const unsigned char*>(base) + int64_t(index) * size - machine.shared.data();
  count_by_site(__builtin_return_address(0), offset, size, true, writes);
  observe_bytes(offset, size, writes);
}

void observe_words(const void* address, int size, bool writes);

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % bytes || (static_cast<unsigned char*>(to) - machine.shared.data()) % bytes) {
    fail("an asynchronous copy is not aligned to " + std::to_string(bytes) + " bytes");
  }
  count_by_site(__builtin_return_address(0), reinterpret_cast<int64_t>(from), bytes, false, false);
  observe_words(from, bytes, false);
  observe_bytes(static_cast<unsigned char*>(to) - machine.shared.data(), bytes, true, true);
  self().open_copies.push_back({static_cast<char*>(to), from, bytes});
}

void commit_copies() {
  self().groups.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}

void wait_for_copies(int pending) {
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      observe_bytes(reinterpret_cast<unsigned char*>(copy.to) - machine.shared.data(), copy.bytes, true, false, true);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void observe_global(const void* address, int size, bool writes) {
  count_by_site(__builtin_return_address(0), reinterpret_cast<int64_t>(address), size, false, writes);
  observe_words(address, size, writes);
}

void observe_words(const void* address, int size, bool writes) {
  Buffer* buffer = find(address, size);
  if (!buffer) fail(std::string(writes ? "write" : "read") + " outside every buffer");
  if (writes && !buffer->writable) fail("write to " + buffer->name);
  if (reinterpret_cast<uintptr_t>(address) % size) fail("an access of " + std::to_string(size) + " bytes to " + buffer->name + " is not aligned");
  buffer->loads += !writes;
  if (buffer->reader.empty()) return;
  const int64_t first = (static_cast<const char*>(address) - buffer->base) / 4;
  const int64_t last = (static_cast<const char*>(address) + size - 1 - buffer->base) / 4;
  for (int64_t w = first; w <= last; ++w) {
    int32_t &reader = buffer->reader[w], &writer = buffer->writer[w];
    const auto other = [&](int32_t stamp) { return stamp >= machine.first_stamp && stamp != machine.stamp; };
    if (other(writer) || (writes && other(reader))) {
      fail("blocks " + std::to_string((other(writer) ? writer : reader) - machine.first_stamp) + " and " +
           std::to_string(machine.stamp - machine.first_stamp) + " of a launch meet in word " + std::to_string(w) + " of " + buffer->name);
    }
    int32_t& mine = writes ? writer : reader;
    if (mine != machine.stamp) {
      (writes ? machine.traffic.written : machine.traffic.read) += size < 4 ? size : 4;
      (writes ? buffer->bytes_written : buffer->bytes_read) += size < 4 ? size : 4;
    }
    if (size >= 4) mine = machine.stamp;
  }
}

void observe_atomic(const void* address, int size) {
  if (!find(address, size)) fail("atomic access outside every buffer");
}

void set_order(Order order, unsigned seed) {
  machine.order = order;
  machine.seed = seed;
}

void run(const char* name, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  machine.name = name;
  machine.kernel = &kernel;
  machine.blocks = blocks;
  machine.shared.resize(shared_bytes);
  machine.failure.clear();
  machine.first_stamp = machine.stamp + 1;
  ++machine.traffic.launches;
  machine.traffic.names += (machine.traffic.names.empty() ? "" : " ") + std::string(name);
  std::mt19937 random(machine.seed);
  std::vector<int64_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (machine.order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
  if (machine.order == Order::kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
  const int32_t first = machine.first_stamp;
  for (int64_t block : sequence) {
    machine.block = block;
    machine.stamp = static_cast<int32_t>(first + block);
    run_block(threads, random);
  }
  machine.stamp = static_cast<int32_t>(first + blocks);
}

namespace {

std::map<std::pair<const void*, int>, SharedLimit> limits;  // by kernel and device

}  // namespace

void set_shared_limit(const char* name, const void* kernel, int device, int64_t bytes) {
  SharedLimit& limit = limits.try_emplace({kernel, device}, SharedLimit{name, device, 0, 0}).first->second;
  if (bytes < limit.bytes) {
    throw std::runtime_error(std::string(name) + ": its shared memory on device " + std::to_string(device) + " is lowered from " +
                             std::to_string(limit.bytes) + " to " + std::to_string(bytes) + " bytes");
  }
  limit.bytes = bytes;
  ++limit.asked;
}

void check_shared_limit(const char* name, const void* kernel, int device, int64_t bytes) {
  const auto found = limits.find({kernel, device});
  const int64_t most = found == limits.end() ? 48 << 10 : found->second.bytes;
  if (bytes > most) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(bytes) + " bytes of shared memory on device " +
                             std::to_string(device) + ", where it may have " + std::to_string(most));
  }
}

std::vector<SharedLimit> shared_limits() {
  std::vector<SharedLimit> all;
  for (const auto& [where, limit] : limits) all.push_back(limit);
  return all;
}

void add_buffer(const std::string& name, const void* base, int64_t bytes, bool writable) {
  const size_t words = bytes < kWatched ? static_cast<size_t>(bytes / 4 + 2) : 0;
  machine.buffers.push_back({name, static_cast<const char*>(base), bytes, writable, nullptr, std::vector<int32_t>(words),
                             std::vector<int32_t>(words)});
}

void* allocate(int64_t bytes) {
  void* whole = nullptr;
  if (posix_memalign(&whole, kGuard, bytes + 2 * kGuard)) throw std::bad_alloc();  // aligned as CUDA's; exact, for sanitizers
  std::unique_ptr<char, Free> memory(static_cast<char*>(whole));
  char* base = memory.get() + kGuard;
  std::memset(memory.get(), kGuardByte, bytes + 2 * kGuard);
  std::memset(base, kPoison, bytes);
  add_buffer("workspace " + std::to_string(machine.buffers.size()), base, bytes, true);
  machine.buffers.back().memory = std::move(memory);
  return base;
}

void clear(void* memory, int64_t bytes) { std::memset(memory, 0, bytes); }

void release_buffers() {
  std::string damaged;
  for (const Buffer& b : machine.buffers) {
    auto& [read, written] = machine.traffic.buffers[b.name];
    read += b.bytes_read;
    written += b.bytes_written;
    machine.traffic.loads[b.name] += b.loads;
    for (int64_t i = 0; b.memory && i < kGuard; ++i) {
      const auto byte = [&](int64_t at) { return static_cast<unsigned char>(b.base[at]); };
      if (byte(-1 - i) != kGuardByte || byte(b.bytes + i) != kGuardByte) damaged = b.name;
    }
  }
  machine.buffers.clear();
  machine.stamp = 0;
  if (!damaged.empty()) throw std::runtime_error("the guard zone of " + damaged + " was written to");
}

Traffic& traffic() { return machine.traffic; }

}  // namespace emulation
