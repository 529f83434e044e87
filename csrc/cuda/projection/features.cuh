// Features on the way from global memory to tensor cores.
#pragma once

#include "weights.cuh"

namespace hetero::cuda {

// A tile of pixels of an image.
struct PixelTile {
  int64_t image, first;
  int count;

  template <int Pixels>
  HK_DEVICE static PixelTile make(const FeatureGrid& grid, int tile) {
    PixelTile out;
    out.image = tile / grid.tiles_of_image;
    out.first = (tile - out.image * grid.tiles_of_image) * Pixels;
    out.count = static_cast<int>(grid.pixels - out.first < Pixels ? grid.pixels - out.first : Pixels);
    return out;
  }
};

// A slice in shared memory: 16 channels of `Pixels` pixels of T, [16][Pixels] or [Pixels][16]. Runs of 16 bytes stay together and
// change places within a row, so that a fragment's lanes find their elements on different banks, whichever way they go.
template <class T, int Inner>
HK_DEVICE int swizzle(int outer) {
  if constexpr (sizeof(T) == 4) return (Inner == 32 ? (outer & 3) << 3 : (outer >> 1 & 1) << 3) | (outer & 4);
  return Inner == 32 ? (outer >> 1 & 3) << 3 : (outer >> 2 & 1) << 3;
}
template <class T, int Pixels, bool PixelMajor>
HK_DEVICE int slice_index(int channel, int pixel) {
  constexpr int kInner = PixelMajor ? kSliceChannels : Pixels;
  const int outer = PixelMajor ? pixel : channel, inner = PixelMajor ? channel : pixel;
  return outer * kInner + (inner ^ swizzle<T, kInner>(outer));
}

HK_DEVICE float widened(float x, DType) { return x; }
HK_DEVICE float widened(uint16_t bits, DType type) {
  return type == DType::kHalf ? half_to_float(bits) : __builtin_bit_cast(float, uint32_t(bits) << 16);
}

// use.template operator()<T, PixelMajor>() with a network's element type and the order of its slices.
template <class Use>
HK_DEVICE void with_layout(const FeatureNetwork& network, Use use) {
  if (network.dtype == DType::kFloat) {
    if (network.pixel_major) {
      use.template operator()<float, true>();
    } else {
      use.template operator()<float, false>();
    }
  } else if (network.pixel_major) {
    use.template operator()<uint16_t, true>();
  } else {
    use.template operator()<uint16_t, false>();
  }
}

// A warp's slices, tile after tile, as they come from memory into a ring of slots.
template <int Pixels>
class SliceStream {
 public:
  // Of the slices [first, first + count) of one network and, after them, [0, other_count) of another, every eighth from the
  // warp's number on, or every `every`th from `begin` on. `keep`: all of a tile stay until they are taken a second time; else
  // each slot is free after the first.
  HK_DEVICE SliceStream(const FeatureGrid& grid, Shared<float> slots, int tile, int step, const FeatureNetwork& network, int first,
                        int count, const FeatureNetwork& other, int other_count, bool keep,
                        int begin = int(threadIdx.x / kWarp), int every = kWarps)
      : grid_(grid), slots_(slots), network_(network), other_(other), first_(first), count_(count),
        all_(count + other_count), words_(slice_words(Pixels, wide(network) || (other_count > 0 && wide(other)) ? 4 : 2)),
        tile_(tile), step_(step), warp_(threadIdx.x / kWarp), lane_(threadIdx.x % kWarp), begin_(begin), every_(every),
        ahead_(begin) {
    ring_ = all_ <= begin ? 0 : keep ? (all_ - begin + every - 1) / every : grid.slots;
    locate();
    for (int i = 0; i < ring_; ++i) {
      next();
      pass();
    }
  }

  // Starts loading the slice after those that are under way, in the oldest one's place; an empty group of copies beyond the
  // last tile.
  HK_DEVICE void next() {
    if (tile_ < grid_.tiles) {
      const bool other = ahead_ >= count_;
      const FeatureNetwork& network = other ? other_ : network_;
      const int64_t channel = int64_t(other ? ahead_ - count_ : first_ + ahead_) * kSliceChannels;
      with_layout(network, [&]<class T, bool PixelMajor>() { load<T, PixelMajor>(network, channel, other ? other_place_ : place_); });
    }
    advance();
  }

  // Waits for the oldest slice; `passed`: how many were, of those that are kept, since they came.
  HK_DEVICE void wait(int passed) const {
    wait_until(ring_ - 1 - passed);
    __syncwarp();
  }

  // Waits for copies that were committed before the first slice's: as many groups as the ring has came after them.
  HK_DEVICE void wait_for_earlier() const { wait_until(ring_); }

  // x[i] = the element at position(i, channel, pixel) of the oldest slice.
  template <int Count, class Position>
  HK_DEVICE void read(const FeatureNetwork& network, float (&x)[Count], Position position) const {
    with_layout(network, [&]<class T, bool PixelMajor>() { read_slot<T, PixelMajor>(oldest_, network, x, position); });
  }

  // The oldest slice has been read: the next one becomes it. Before that `refill` takes its place, unless it is kept.
  HK_DEVICE void pass() { oldest_ = oldest_ + 1 == ring_ ? 0 : oldest_ + 1; }
  HK_DEVICE void refill() {
    __syncwarp();
    next();
  }

  // The same of one network's slices, whose layout the compiler knows; of the oldest or, `after`, the one that came after it.
  template <class T, bool PixelMajor, int Count, class Position>
  HK_DEVICE void read_as(bool after, float (&x)[Count], Position position) const {
    read_slot<T, PixelMajor>(!after ? oldest_ : oldest_ + 1 == ring_ ? 0 : oldest_ + 1, network_, x, position);
  }
  template <class T, bool PixelMajor>
  HK_DEVICE void refill_as() {
    __syncwarp();
    if (tile_ < grid_.tiles) load<T, PixelMajor>(network_, int64_t(first_ + ahead_) * kSliceChannels, place_);
    advance();
  }

 private:
  HK_DEVICE static bool wide(const FeatureNetwork& n) { return n.dtype == DType::kFloat; }

  HK_DEVICE void advance() {
    commit_copies();
    ahead_ += every_;
    if (ahead_ < all_) return;
    ahead_ = begin_;
    tile_ += step_;
    locate();
  }

  template <class T, bool PixelMajor, int Count, class Position>
  HK_DEVICE void read_slot(int number, const FeatureNetwork& network, float (&x)[Count], Position position) const {
    const Shared<T> slice = slot<T>(number);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      int channel, pixel;
      position(i, channel, pixel);
      x[i] = widened(slice[slice_index<T, Pixels, PixelMajor>(channel, pixel)], network.dtype);
    }
  }

  template <class T>
  HK_DEVICE Shared<T> slot(int number) const {
    const int at = (number * kWarps + warp_) * words_;
    return Shared<T>(reinterpret_cast<T*>(slots_.address(at)), words_ * 4 / int(sizeof(T)));
  }

  // Where the lane's pixel of the tile to load lies in both networks.
  HK_DEVICE void locate() {
    if (tile_ >= grid_.tiles) return;
    const PixelTile tile = PixelTile::make<Pixels>(grid_, tile_);
    pixels_ = tile.count;
    const int64_t n = tile.first + (lane_ % Pixels < pixels_ ? lane_ % Pixels : 0);
    place_ = offset(network_, tile.image, n);
    other_place_ = offset(other_, tile.image, n);
  }

  HK_DEVICE int64_t offset(const FeatureNetwork& network, int64_t image, int64_t n) const {
    const int64_t start = image * network.stride[0];
    if (network.flat) return start + n * network.stride[3];
    const int64_t row = n / grid_.width;
    return start + row * network.stride[2] + (n - row * grid_.width) * network.stride[3];
  }

  template <class T, bool PixelMajor>
  HK_DEVICE void load(const FeatureNetwork& network, int64_t channel, int64_t place) const {
    const int64_t left = network.channels - channel;
    const int channels = static_cast<int>(left < kSliceChannels ? left : kSliceChannels);
    const Shared<T> to = slot<T>(oldest_);
    const T* data = static_cast<const T*>(network.data);
    if (!network.aligned) {
      constexpr int kAtOnce = kWarp / Pixels;  // channels: 1 or 2
      const int pixel = lane_ % Pixels;
#pragma unroll 4
      for (int c = lane_ / Pixels; c < kSliceChannels; c += kAtOnce) {
        const bool inside = pixel < pixels_ && c < channels;
        const int at = slice_index<T, Pixels, PixelMajor>(c, pixel);
        const T* from = data + place + (channel + c) * network.stride[1];
        if constexpr (sizeof(T) != 4) {
          to.set(at, inside ? hetero::cuda::read(from) : T(0));
        } else if (inside) {
          copy_async<4>(to, at, from);
        } else {
          to.set(at, T(0));
        }
      }
      return;
    }
    constexpr int kRun = 16 / int(sizeof(T)), kRuns = (PixelMajor ? kSliceChannels : Pixels) / kRun;
    constexpr int kAll = kRuns * (PixelMajor ? Pixels : kSliceChannels);
#pragma unroll
    for (int i = 0; i < kAll; i += kWarp) {
      const int outer = (i + lane_) / kRuns, inner = (i + lane_) % kRuns * kRun;
      const int c = PixelMajor ? inner : outer, pixel = PixelMajor ? outer : inner;
      const int64_t from = __shfl_sync(kAllLanes, place, pixel) + (channel + c) * network.stride[1];
      const int inside = pixel < pixels_ && c < channels ? (PixelMajor ? channels - c : pixels_ - pixel) : 0;
      const int at = slice_index<T, Pixels, PixelMajor>(c, pixel);
      if (inside >= kRun) {
        copy_async(to, at, data + from);
      } else {
        for (int j = 0; j < kRun; ++j) to.set(at + j, j < inside ? hetero::cuda::read(data + from + j) : T(0));
      }
    }
  }

  const FeatureGrid& grid_;
  const Shared<float> slots_;
  const FeatureNetwork &network_, &other_;
  const int first_, count_, all_, words_;
  int tile_;
  const int step_, warp_, lane_, begin_, every_;
  int64_t place_ = 0, other_place_ = 0;
  int pixels_ = 0, ring_, ahead_, oldest_ = 0;
};

// A warp's slice as fragments want it: of both steps of 8 channels, by rows of fragments.
template <int RowTiles>
using SliceElements = float[kSliceChannels / 8 * RowTiles * 4];

template <int RowTiles>
HK_DEVICE void read_slice(SliceElements<RowTiles>& x, const SliceStream<16 * RowTiles>& stream, const FeatureNetwork& network) {
  const LaneOfFragment at;
  stream.read(network, x, [&](int i, int& c, int& pixel) {
    c = 8 * (i / 4 / RowTiles) + at.inner(i % 4);
    pixel = i / 4 % RowTiles * 16 + at.row(i % 4);
  });
}

// sums += a slice by the weights of classes in tiles of 8, tiles side by side, as their products wait for each other. `Exact`:
// features are, as halves.
template <bool Exact, int RowTiles, int ClassTiles, class Weights>
HK_DEVICE void project_slice(FragmentC (&sums)[RowTiles][ClassTiles], const SliceElements<RowTiles>& x, Weights& weights, int which,
                             int channel, int class_tiles, bool exact_weights) {
  constexpr int kAtOnce = Weights::kAtOnce;
#pragma unroll Weights::kSteps
  for (int s = 0; s < kSliceChannels / 8; ++s) {
    weights.open(which, channel, s);
    SplitA a[RowTiles];
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      float mine[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[i] = s == 0 ? x[4 * r + i] : x[4 * (RowTiles + r) + i];
      a[r] = SplitA::make(mine);
    }
#pragma unroll
    for (int some = 0; some < ClassTiles; some += kAtOnce) {
      if (some < class_tiles) {
        SplitB b[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) b[n] = weights.take(s, some + n);
        FragmentC products[RowTiles][kAtOnce];
        const auto each = [&](auto add) {
#pragma unroll
          for (int i = 0; i < RowTiles * kAtOnce; ++i) add(products[i / kAtOnce][i % kAtOnce], a[i / kAtOnce], b[i % kAtOnce]);
        };
        if constexpr (!Exact) {
          each([](FragmentC& c, const SplitA& l, const SplitB& r) { c = product_tf32(l.big, r.small); });
          each([](FragmentC& c, const SplitA& l, const SplitB& r) { multiply_tf32(c, l.small, r.big); });
        } else if (!exact_weights) {
          each([](FragmentC& c, const SplitA& l, const SplitB& r) { c = product_tf32(l.big, r.small); });
        } else {
          each([](FragmentC& c, const SplitA&, const SplitB&) { c = {{0.f, 0.f, 0.f, 0.f}}; });
        }
        each([](FragmentC& c, const SplitA& l, const SplitB& r) { multiply_tf32(c, l.big, r.big); });
#pragma unroll
        for (int i = 0; i < RowTiles * kAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i / kAtOnce][some + i % kAtOnce].x[j] += products[i / kAtOnce][i % kAtOnce].x[j];
        }
      }
      weights.refill(s, some + kAtOnce);
    }
  }
}

// Writes the weights' gradient of slice number `slice` of a network to its slot, of the classes from `first_class` on.
template <int ClassTiles>
HK_DEVICE void store_sums(const FragmentC (&sums)[ClassTiles], int slice, const FeatureNetwork& network, int64_t slot, int classes,
                          int first_class) {
  const LaneOfFragment at;
  const int64_t first = int64_t(slice) * kSliceChannels;
#pragma unroll
  for (int n = 0; n < ClassTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t channel = first + at.sum_row(i);
      const int c = first_class + 8 * n + at.sum_column(i);
      if (c < classes && channel < network.channels) {
        write(network.weight_slots + (slot * classes + c) * network.channels + channel, sums[n].x[i]);
      }
    }
  }
}

// Gradients of the weights of a warp's slices, for classes in tiles of 8: sums over pixels.
template <int Slices, int ClassTiles, int Pixels>
struct WeightSums {
  FragmentC sums[Slices][ClassTiles];

  HK_DEVICE WeightSums() {
#pragma unroll
    for (int j = 0; j < Slices; ++j) {
#pragma unroll
      for (int n = 0; n < ClassTiles; ++n) sums[j][n] = {{0.f, 0.f, 0.f, 0.f}};
    }
  }

  // Adds what the oldest slice of `stream` gives with the logits' gradient [K][Pixels], which begins at `gradient_at`. Features of
  // pixels that do not count, perhaps NaN, are taken as 0. `j`, which of the warp's slices it is, is known to the compiler.
  HK_DEVICE void add(int j, const SliceStream<Pixels>& stream, const FeatureNetwork& network, Shared<float> gradient,
                     int gradient_at, int class_tiles, unsigned valid) {
    const LaneOfFragment at;
    const bool exact = network.dtype != DType::kFloat;
#pragma unroll 1
    for (int first = 0; first < Pixels; first += 16) {
      float x[8];
      stream.read(network, x, [&](int i, int& channel, int& pixel) {
        channel = at.row(i % 4);
        pixel = first + at.inner(i % 4) + i / 4 * 8;
      });
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int pixel = first + 8 * s;
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * s + i] = valid >> (pixel + at.inner(i)) & 1 ? x[4 * s + i] : 0.f;
        const SplitA a = SplitA::make(x + 4 * s);
#pragma unroll
        for (int n = 0; n < ClassTiles; ++n) {
          if (n >= class_tiles) continue;
          const int from = gradient_at + (8 * n + at.g) * class_pitch(Pixels) + pixel + at.t;
          add_product(sums[j][n], a, SplitB::make(gradient[from], gradient[from + 4]), exact, false);
        }
      }
    }
  }

  // Writes those of the warp's slice `j`, which is number `slice` of its network, to the network's slot.
  HK_DEVICE void store(int j, int slice, const FeatureNetwork& network, int64_t slot, int classes) const {
    store_sums(sums[j], slice, network, slot, classes, 0);
  }
};

}  // namespace hetero::cuda
