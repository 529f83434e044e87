// How the lanes of a warp meet memory: banks of shared memory, sectors of global memory, by the instruction that asks.
//
// Lanes run one after the other. What belongs to one instruction of a warp is found by the address that calls, and by how often
// a lane has been there since it last met the others (at a barrier or a collective).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

struct Access {
  const void* site;  // the address behind the call
  int thread;
  int64_t meeting;   // how often the thread has met others
  int64_t address;
  int bytes;
  bool shared, writes;
};

// Sums over the warps that came by an instruction of a kernel.
struct Requests {
  std::string kernel;
  bool shared, writes;
  int64_t site;      // from the library's beginning on: nm -C names its function
  int64_t requests;  // of a warp
  int64_t taken;     // shared: cycles of the banks; global: sectors of 32 bytes
  int64_t least;     // that so many bytes need
};

void count_accesses(bool wanted);
bool counts_accesses();
void count_access(const Access& access);
void end_accesses(const char* kernel);  // of a block
std::vector<Requests> take_requests();

}  // namespace emulation
