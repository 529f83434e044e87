// What this machine does per cycle: the rates behind the floors of docs/performance-log.md, for the functions as the CPU
// kernels use them. AVX-512 only. Build and run from the repository's root:
//
//   g++ -std=c++20 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -w benchmarks/rates.cpp -o rates
//   ./rates
//
// Every line is cycles per vector of 16 floats, the best of many runs; a cycle is the latency of an integer addition.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "../csrc/cpu/core/pair.h"

#if !defined(__AVX512F__)
int main() { std::puts("this machine has no AVX-512"); }
#else

using namespace hetero;
using V = Pair<Vec<16>>;

namespace {

constexpr int kCount = 1024, kRepeats = 20, kRuns = 300;
alignas(64) float a[kCount], b[kCount], out[kCount];

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Body>
double best(Body body) {
  double least = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const double start = now();
    body();
    const double time = now() - start;
    least = time < least ? time : least;
  }
  return least;
}

double cycle() {
  return best([] {
           for (int i = 0; i < 10000; ++i) {
             asm volatile("add $1,%%rax\n add $1,%%rax\n add $1,%%rax\n add $1,%%rax\n" ::: "rax");
           }
         }) / 40000;
}

template <class Function>
void vectors(const char* name, double cycle, Function function) {
  const double time = best([&] {
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      for (int i = 0; i < kCount; i += V::kLanes) function(V::load(a + i), V::load(b + i)).store(out + i);
      asm volatile("" ::: "memory");
    }
  });
  std::printf("%-34s %5.1f\n", name, time / cycle / (kRepeats * kCount / 16));
}

#define HK_INSTRUCTIONS(name, text, count)                                                              \
  std::printf("%-34s %5.2f\n", name, best([] {                                                          \
                for (int i = 0; i < 10000; ++i) {                                                       \
                  asm volatile(text ::: "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7"); \
                }                                                                                       \
              }) / tick / 10000 / count)

#define HK_FOUR(f) f(0) f(1) f(2) f(3)
#define HK_FMA(i) "vfmadd231ps %%zmm20,%%zmm21,%%zmm" #i "\n"
#define HK_ADD(i) "vaddps %%zmm20,%%zmm21,%%zmm" #i "\n"
#define HK_PERMUTE(i) "vpermps %%zmm20,%%zmm21,%%zmm" #i "\n"
#define HK_DIVIDE(i) "vdivps %%zmm20,%%zmm21,%%zmm" #i "\n"
#define HK_LOGIC(i) "vpandd %%zmm20,%%zmm21,%%zmm" #i "\n"
#define HK_SHIFT(i) "vpslld $19,%%zmm21,%%zmm" #i "\n"

}  // namespace

int main() {
  for (int i = 0; i < kCount; ++i) {
    a[i] = (static_cast<float>(std::rand()) / RAND_MAX - 0.5f) * 20;
    b[i] = static_cast<float>(std::rand()) / RAND_MAX * 5 + 0.1f;
  }
  const double tick = cycle();
  std::printf("cycle %.3f ns\n", tick * 1e9);
  HK_INSTRUCTIONS("multiply-add", HK_FOUR(HK_FMA), 4);
  HK_INSTRUCTIONS("add", HK_FOUR(HK_ADD), 4);
  HK_INSTRUCTIONS("multiply-add and add, each pair", HK_FOUR(HK_FMA) HK_FOUR(HK_ADD), 4);
  HK_INSTRUCTIONS("permute", HK_FOUR(HK_PERMUTE), 4);
  HK_INSTRUCTIONS("shift", HK_FOUR(HK_SHIFT), 4);
  HK_INSTRUCTIONS("add and shift, each pair", HK_FOUR(HK_ADD) HK_FOUR(HK_SHIFT), 4);
  HK_INSTRUCTIONS("logic", HK_FOUR(HK_LOGIC), 4);
  HK_INSTRUCTIONS("divide", HK_FOUR(HK_DIVIDE), 4);
  vectors("load, load, add, store", tick, [](V x, V y) { return x + y; });
  vectors("2^x", tick, [](V x, V) { return math::exp2_bounded(x); });
  vectors("log2(1 + x)", tick, [](V, V y) { return math::log2_1p(y); });
  vectors("x / y", tick, [](V x, V y) { return x / y; });
}
#endif
