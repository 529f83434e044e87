// Fibers: functions that can be left in the middle and gone back to, each on a stack of its own.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace emulation {

class Fibers {
 public:
  Fibers();
  ~Fibers();
  // `count` fibers that are about to begin `body`. Those that were left in the middle are forgotten.
  void prepare(int count, void (*body)());
  void resume(int fiber);  // runs it until it suspends or ends
  void suspend();          // inside one

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace emulation
