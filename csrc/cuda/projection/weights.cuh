// Weights on the way from global memory to tensor cores: in shared memory, or in the order in which lanes want them, through the
// caches and ahead of their use.
#pragma once

#include "../core/async.cuh"
#include "features.h"
#include "products.cuh"

namespace hetero::cuda {

// The weights of one network, or of two, one after the other.
struct WeightPacking {
  FeatureNetwork features[2];  // the second may have no slices
  int classes, class_tiles;    // class_tiles: that there is room for
  uint64_t* packed;
};

constexpr int kPackThreads = 128;

inline int64_t packed_words(const WeightPacking& p) {
  return int64_t(p.features[0].slices + p.features[1].slices) * (kSliceChannels / 8) * p.class_tiles * 32;
}

// [8 channels][8 classes][lane]: channels t and t + 4 of class g, 0 beyond.
HK_KERNEL void __launch_bounds__(kPackThreads) pack_weights_kernel(const __grid_constant__ WeightPacking p) {
  constexpr int kSteps = kSliceChannels / 8;
  const int64_t at = int64_t(blockIdx.x) * kPackThreads + threadIdx.x, step = at / kWarp / p.class_tiles;
  const int64_t others = int64_t(p.features[0].slices) * kSteps;
  const int lane = threadIdx.x % kWarp;
  const bool other = step >= others;
  const FeatureNetwork& network = p.features[other];
  const int64_t k = at / kWarp % p.class_tiles * 8 + lane / 4, c = (other ? step - others : step) * 8 + lane % 4;
  if (step >= others + int64_t(p.features[1].slices) * kSteps) return;
  const Matrix& m = network.weight;
  const auto weight = [&](int64_t channel) {
    if (k >= p.classes || channel >= network.channels) return 0u;
    return __builtin_bit_cast(uint32_t, read_float(m.data, m.dtype, k * m.stride[0] + channel * m.stride[1]));
  };
  write(p.packed + at, uint64_t(weight(c + 4)) << 32 | weight(c));
}

HK_DEVICE SplitB unpacked(uint64_t w) {
  const auto half = [&](int shift) { return __builtin_bit_cast(float, static_cast<uint32_t>(w >> shift)); };
  return SplitB::make(half(0), half(32));
}

// Class tiles whose packed weights are multiplied side by side: as registers allow.
HK_INLINE constexpr int tiles_at_once(int class_tiles) { return class_tiles == kMostClassTiles ? 2 : 1; }
HK_INLINE int whole_class_tiles(int64_t classes, int compiled) {
  const int some = tiles_at_once(compiled);
  return (class_tiles_of(classes) + some - 1) / some * some;
}

// Packed weights as a warp takes them, of every eighth slice: in registers, a step of 8 channels ahead, or a slice where
// classes are few. What a product has taken makes room for what the next step has in its place.
template <int ClassTiles>
class PackedWeights {
 public:
  static constexpr int kAtOnce = tiles_at_once(ClassTiles), kSteps = ClassTiles == kFewClassTiles ? kSliceChannels / 8 : 1,
                       kPart = ClassTiles / 2;

  HK_DEVICE PackedWeights(const uint64_t* packed, int classes, int slices)
      : packed_(packed + threadIdx.x % kWarp), tiles_(whole_class_tiles(classes, ClassTiles)), slices_(slices) {
#pragma unroll
    for (int i = 0; i < kSteps * ClassTiles; ++i) words_[i / ClassTiles][i % ClassTiles] = 0;
  }

  // A tile's first.
  HK_DEVICE void start() {
    slice_ = static_cast<int>(threadIdx.x / kWarp);
    if (slice_ >= slices_) return;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int n = 0; n < ClassTiles; ++n) {
        if (n < tiles_) words_[s][n] = read(place(slice_, s) + n * int(kWarp));
      }
    }
  }

  // Step s of a slice begins.
  HK_DEVICE void open(int, int, int s) {
    const bool within = kSteps == 1 && s == 0;
    const int next = within ? slice_ : slice_ + kWarps;
    next_ = next < slices_ ? place(next, kSteps == 1 ? !s : s) : place(slice_, s);  // the last one's once more, for no branch
    if (s == kSliceChannels / 8 - 1) slice_ = next;
  }
  HK_DEVICE SplitB take(int s, int n) {
    return unpacked(words_[kSteps == 1 ? 0 : s][n]);
  }
  // Tiles before `end` have been multiplied: a part's loads share one wait, and each has a step of its own.
  HK_DEVICE void refill(int s, int end) {
#pragma unroll
    for (int n = 0; n < ClassTiles; ++n) {
      if (end == (n / kPart + 1) * kPart && n < tiles_) words_[kSteps == 1 ? 0 : s][n] = read(next_ + n * int(kWarp));
    }
  }

 private:
  HK_DEVICE const uint64_t* place(int slice, int s) const {
    return packed_ + (int64_t(slice) * (kSliceChannels / 8) + s) * tiles_ * int(kWarp);
  }

  const uint64_t* const packed_;
  const int tiles_, slices_;
  const uint64_t* next_ = nullptr;
  uint64_t words_[kSteps][ClassTiles];
  int slice_ = 0;
};

// Both networks' weights in shared memory, as floats.
class ResidentWeights {
 public:
  static constexpr int kAtOnce = 1, kSteps = 1;

  HK_DEVICE ResidentWeights(const FeatureNetwork& student, const FeatureNetwork& teacher, int classes, SharedAllocator& memory)
      : classes_(classes), pitch_{weight_pitch(student.slices), weight_pitch(teacher.slices)} {
    for (int i = 0; i < 2; ++i) staged_[i] = memory.take<float>(classes * pitch_[i]);
  }

  // Begins a group of copies, empty where weights are halves; `wait_for_earlier` and a barrier must follow. A warp has every
  // eighth class.
  HK_DEVICE void stage(int which, const FeatureNetwork& network) const {
    const Matrix& m = network.weight;
    const Shared<float> staged = staged_[which];
    const int channels = static_cast<int>(network.channels), end = network.slices * kSliceChannels, lane = threadIdx.x % kWarp;
    const bool floats = m.dtype == DType::kFloat, runs = floats && m.stride[1] == 1 && (m.stride[0] | channels) % 4 == 0 &&
                                                         reinterpret_cast<uint64_t>(m.data) % 16 == 0;
    for (int k = threadIdx.x / kWarp; k < classes_; k += kWarps) {
      const int to = k * pitch_[which];
      const float* row = static_cast<const float*>(m.data) + k * m.stride[0];
      if (runs) {
        for (int c = 4 * lane; c < channels; c += 4 * kWarp) copy_async(staged, to + c, row + c);
      } else if (floats) {
        for (int c = lane; c < channels; c += kWarp) copy_async<4>(staged, to + c, row + c * m.stride[1]);
      } else {
        const uint16_t* halves = static_cast<const uint16_t*>(m.data) + k * m.stride[0];
        constexpr int kAsked = 4;  // at once
        for (int first = lane; first < channels; first += kAsked * kWarp) {
          uint16_t w[kAsked];
#pragma unroll
          for (int i = 0; i < kAsked; ++i) {
            const int c = first + i * int(kWarp);
            w[i] = c < channels ? hetero::cuda::read(halves + c * m.stride[1]) : 0;
          }
#pragma unroll
          for (int i = 0; i < kAsked; ++i) {
            const int c = first + i * int(kWarp);
            if (c < channels) staged.set(to + c, to_float(w[i], m.dtype));
          }
        }
      }
      for (int c = channels + lane; c < end; c += kWarp) staged.set(to + c, 0.f);
    }
    commit_copies();
  }

  HK_DEVICE void start() {}
  HK_DEVICE void refill(int, int) {}
  HK_DEVICE void open(int which, int channel, int s) {
    which_ = which;
    from_ = channel + 8 * s + static_cast<int>(threadIdx.x) % 4;
  }
  HK_DEVICE SplitB take(int, int n) const {
    const int k = 8 * n + static_cast<int>(threadIdx.x % kWarp) / 4, at = k * pitch_[which_] + from_;
    return k < classes_ ? SplitB::make(staged_[which_][at], staged_[which_][at + 4]) : SplitB::make(0.f, 0.f);
  }

 private:
  const int classes_, pitch_[2];
  Shared<float> staged_[2];
  int which_ = 0, from_ = 0;
};

}  // namespace hetero::cuda
