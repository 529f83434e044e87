#include "accesses.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

namespace emulation {

namespace {

constexpr int kWarp = 32, kBanks = 32, kBankBytes = 4, kSector = 32;

struct Lane {
  int lane;
  int64_t address;
  int bytes;
};

using Site = std::tuple<bool, bool, const void*>;             // shared, writes, site
using Instruction = std::tuple<int, int64_t, Site, int>;      // warp, meeting, site, how often since
struct Visits {
  int64_t meeting = -1;
  std::unordered_map<const void*, int> times;
};

bool wanted_ = false;
std::vector<Visits> visits_;  // by thread
std::map<Instruction, std::vector<Lane>> open_;
std::map<std::pair<std::string, Site>, std::array<int64_t, 3>> found_;  // requests, taken, least

// Cycles that the banks take for a request, which comes in as many parts as 128 bytes hold of its accesses, and the parts.
std::pair<int64_t, int64_t> bank_cycles(const std::vector<Lane>& lanes) {
  const int together = std::min(kWarp, kWarp * kBankBytes / lanes.front().bytes);
  int64_t cycles = 0, parts = 0;
  for (int first = 0; first < kWarp; first += together) {
    std::array<std::set<int64_t>, kBanks> words;
    for (const Lane& l : lanes) {
      if (l.lane < first || l.lane >= first + together) continue;
      for (int64_t w = l.address / kBankBytes; w <= (l.address + l.bytes - 1) / kBankBytes; ++w) words[w % kBanks].insert(w);
    }
    size_t most = 0;
    for (const auto& of_bank : words) most = std::max(most, of_bank.size());
    cycles += static_cast<int64_t>(most);
    parts += most > 0;
  }
  return {cycles, parts};
}

// Sectors that a request touches, and as many as its bytes would fill.
std::pair<int64_t, int64_t> sectors(const std::vector<Lane>& lanes) {
  std::set<int64_t> touched;
  std::set<std::pair<int64_t, int>> places;
  int64_t bytes = 0;
  for (const Lane& l : lanes) {
    for (int64_t s = l.address / kSector; s <= (l.address + l.bytes - 1) / kSector; ++s) touched.insert(s);
    if (places.insert({l.address, l.bytes}).second) bytes += l.bytes;
  }
  return {static_cast<int64_t>(touched.size()), (bytes + kSector - 1) / kSector};
}

}  // namespace

void count_accesses(bool wanted) {
  wanted_ = wanted;
  open_.clear();  // of a block that failed
  visits_.clear();
}
bool counts_accesses() { return wanted_; }

void count_access(const Access& a) {
  if (a.thread >= static_cast<int>(visits_.size())) visits_.resize(a.thread + 1);
  Visits& visits = visits_[a.thread];
  if (visits.meeting != a.meeting) {
    visits.meeting = a.meeting;
    visits.times.clear();
  }
  const int times = visits.times[a.site]++;
  open_[{a.thread / kWarp, a.meeting, {a.shared, a.writes, a.site}, times}].push_back({a.thread % kWarp, a.address, a.bytes});
}

void end_accesses(const char* kernel) {
  for (const auto& [instruction, lanes] : open_) {
    const Site& site = std::get<2>(instruction);
    const auto [taken, least] = std::get<0>(site) ? bank_cycles(lanes) : sectors(lanes);
    auto& sums = found_[{kernel, site}];
    ++sums[0];
    sums[1] += taken;
    sums[2] += least;
  }
  open_.clear();
  visits_.clear();
}

std::vector<Requests> take_requests() {
  std::vector<Requests> out;
  for (const auto& [key, sums] : found_) {
    const auto& [shared, writes, site] = key.second;
    Dl_info library{};
    dladdr(site, &library);
    const int64_t at = static_cast<const char*>(site) - static_cast<const char*>(library.dli_fbase);
    out.push_back({key.first, shared, writes, at, sums[0], sums[1], sums[2]});
  }
  found_.clear();
  return out;
}

}  // namespace emulation
