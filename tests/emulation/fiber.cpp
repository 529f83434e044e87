#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

namespace {

constexpr size_t kStack = 256 << 10;

#if defined(__x86_64__)
// Saves what a function must preserve and goes on where `to` was left. ucontext makes a system call for the same.
extern "C" void hk_switch(void** from, void* to);
asm(R"(
.text
.type hk_switch,@function
hk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hk_switch,.-hk_switch
)");
using Context = void*;
#else
using Context = ucontext_t;
#endif

}  // namespace

struct Fibers::State {
  std::vector<char*> stacks;
  std::vector<Context> contexts;
  std::vector<void*> fake_stacks;
  Context scheduler{};
  void (*body)() = nullptr;
  int current = 0;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;

  static State* running;
  static void entry() {
    running->arrived();
    running->body();
    running->leave(true);
    std::abort();
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  }

  void swap(Context& from, Context& to) {
#if defined(__x86_64__)
    hk_switch(&from, to);
#else
    swapcontext(&from, &to);
#endif
  }

  void leave([[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stacks[current], scheduler_stack, scheduler_size);
#endif
    const int me = current;
    swap(contexts[me], scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stacks[me], &scheduler_stack, &scheduler_size);
#endif
  }
};
Fibers::State* Fibers::State::running = nullptr;

Fibers::Fibers() : state_(new State) {}
Fibers::~Fibers() {
  for (char* stack : state_->stacks) munmap(stack, kStack);
}

void Fibers::prepare(int count, void (*body)()) {
  State& s = *state_;
  s.body = body;
  State::running = &s;
  while (static_cast<int>(s.stacks.size()) < count) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    s.stacks.push_back(static_cast<char*>(stack));
  }
  s.contexts.resize(count);
  s.fake_stacks.assign(count, nullptr);
  for (int i = 0; i < count; ++i) {
#if defined(__x86_64__)
    // Six registers and the address to return to, the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(s.stacks[i] + kStack) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&State::entry);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    s.contexts[i] = top;
#else
    getcontext(&s.contexts[i]);
    s.contexts[i].uc_stack.ss_sp = s.stacks[i];
    s.contexts[i].uc_stack.ss_size = kStack;
    s.contexts[i].uc_link = nullptr;
    makecontext(&s.contexts[i], &State::entry, 0);
#endif
  }
}

void Fibers::resume(int fiber) {
  State& s = *state_;
  s.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.scheduler_fake, s.stacks[fiber], kStack);
#endif
  s.swap(s.scheduler, s.contexts[fiber]);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.scheduler_fake, nullptr, nullptr);
#endif
}

void Fibers::suspend() { state_->leave(false); }

}  // namespace emulation
