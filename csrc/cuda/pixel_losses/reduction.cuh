// What turns the tiles' sums and slots into a loss and its gradient (docs/mathematics.md, section 8): divisors that the main
// launch must know, before it; one small launch after it. Everything is added up in a fixed order.
#pragma once

#include "walk.cuh"

namespace hetero::cuda {

constexpr int kFinishThreads = 128, kFinishClasses = 8;  // a block's coarse columns and classes
constexpr int kDivisorBlocks = 256;

// A block's part of the number of valid pixels and of the sum of their class weights, to `parts` [2, blocks].
HK_KERNEL void __launch_bounds__(128) divisors_kernel(const Problem p, const float* class_weight, float* parts) {
  SharedAllocator memory(dynamic_shared_memory());
  const CommonArrays arrays(memory, ClassOrder(1, 1));
  float count = 0.f, weights = 0.f;
  // A block's rows: every gridDim.x-th.
  const int64_t rows = p.batch * p.rows.fine, block = blockIdx.x;
  const auto offset = [&](int i) {
    const int64_t row = block + int64_t(i) * gridDim.x;
    return label_row(p, row / p.rows.fine, row % p.rows.fine);
  };
  each_label(p, static_cast<int>((rows - block + gridDim.x - 1) / gridDim.x), 0, static_cast<int>(p.columns.fine), offset,
             [&](int, int, int64_t label) {
               const int known = Pixel::class_of(p, label);
               count += known >= 0 ? 1.f : 0.f;
               if (class_weight && known >= 0) weights += read(class_weight + known);
             });
  count = sum_over_block(count, arrays.scratch[0]);
  weights = sum_over_block(weights, arrays.scratch[1]);
  if (threadIdx.x != 0) return;
  write(parts + blockIdx.x, count);
  write(parts + gridDim.x + blockIdx.x, weights);
}

// Makes a piece's gradients by what raw logits mean those by the logits; writes what scale and shift get of them. `column` of a
// row of an image; without one a thread's gradients are 0.
HK_DEVICE void by_raw_logits(const Problem& p, const Network& network, float (&gradient)[kFinishClasses], int first_class, int64_t image,
                             int64_t row, int64_t column, bool inside, int64_t piece) {
  constexpr int kFinishWarps = kFinishThreads / int(kWarp);
  SharedAllocator memory(dynamic_shared_memory());
  const Shared<float> sums = memory.take<float>(2 * kFinishClasses * kFinishWarps);
  const int64_t start = image * network.stride[0] + row * network.stride[2] + column * network.stride[3];
#pragma unroll
  for (int i = 0; i < kFinishClasses; ++i) {
    const int c = first_class + i < p.classes ? first_class + i : p.classes - 1;
    const float z = inside ? read_float(network.logits, network.dtype, start + c * network.stride[1]) : 0.f;
    NormalizationGradient<Value> by(Value(read(network.scale + c)), Value(read(network.shift + c)), network.relu);
    gradient[i] = by.take(Value(z), Value(gradient[i])).v;
    add_over_group(by.by_scale, kWarp);
    add_over_group(by.by_shift, kWarp);
    if (threadIdx.x % kWarp != 0) continue;
    sums.set((2 * i) * kFinishWarps + threadIdx.x / kWarp, by.by_scale.v);
    sums.set((2 * i + 1) * kFinishWarps + threadIdx.x / kWarp, by.by_shift.v);
  }
  __syncthreads();
  const int i = threadIdx.x / 2, c = first_class + i, which = threadIdx.x % 2;
  if (i >= kFinishClasses || c >= p.classes) return;
  float sum = 0.f;
  for (int warp = 0; warp < kFinishWarps; ++warp) sum += sums[threadIdx.x * kFinishWarps + warp];
  write(network.normalization_parts + (piece * 2 + which) * p.classes + c, sum);
}

// A piece's gradients, from the slots of the tiles that reach them.
template <class Int>
HK_DEVICE void add_slots_of_tiles(const Problem& p, const Network& network, float (&sum)[kFinishClasses], int first_class, int64_t image,
                                  Int row, Int column) {
  const ExactAxis &rows = network.rows, &columns = network.columns;
  // Pixels that reach a coarse position lie between the first beside the one before and the first beside the one after.
  const Int y = rows.first<Int>(row - !rows.identity), y_end = rows.first<Int>(row + 1);
  const Int x = columns.first<Int>(column - !columns.identity), x_end = columns.first<Int>(column + 1);
  if (y >= y_end || x >= x_end) return;
  const Int last_row_tile = p.rows.of<Int>(y_end - 1), first_tile = p.columns.of<Int>(x), last_tile = p.columns.of<Int>(x_end - 1);
  for (Int row_tile = p.rows.of<Int>(y); row_tile <= last_row_tile; ++row_tile) {
    const Int slot_row = row - rows.lower<Int>(p.rows.begin<Int>(row_tile));
    for (Int tile = first_tile; tile <= last_tile; ++tile) {
      const Int n = column - columns.lower<Int>(p.columns.begin<Int>(tile));
      const int64_t index = (image * p.rows.count + row_tile) * p.columns.count + tile;
      const float* slot = network.gradient + ((index * network.slot_rows + slot_row) * p.classes + first_class) * network.span + n;
      for (int i = 0; i < kFinishClasses; ++i) {
        if (first_class + i < p.classes) sum[i] += read(slot + i * network.span);
      }
    }
  }
}

// Adds up a network's slots: a block has one coarse row of an image, a thread one column of it and some classes. The gradient by
// what raw logits mean may be in place already.
template <class Int>
HK_DEVICE void finish_network(const Problem& p, const Network& network, float* out, Int number, float scale) {
  using Unsigned = std::make_unsigned_t<Int>;
  const int64_t height = network.rows.coarse, width = network.columns.coarse;
  const Unsigned column_blocks = static_cast<Unsigned>((width + kFinishThreads - 1) / kFinishThreads);
  const Unsigned class_blocks = static_cast<Unsigned>((p.classes + kFinishClasses - 1) / kFinishClasses);
  Unsigned block = static_cast<Unsigned>(number);
  const Int column_block = static_cast<Int>(block % column_blocks), column = column_block * kFinishThreads + Int(threadIdx.x);
  block /= column_blocks;
  const int first_class = static_cast<int>(block % class_blocks) * kFinishClasses;
  block /= class_blocks;
  const Int row = static_cast<Int>(block % static_cast<Unsigned>(height));
  const int64_t image = block / static_cast<Unsigned>(height);
  const bool inside = column < width;
  const int end_class = first_class + kFinishClasses < p.classes ? first_class + kFinishClasses : p.classes;
  float* to = out + ((image * p.classes + first_class) * height + row) * width + column;
  float sum[kFinishClasses] = {};
  if (inside && network.direct) {
    for (int i = 0; i < kFinishClasses; ++i) {
      if (first_class + i < end_class) sum[i] = read_back(to + i * height * width);
    }
  } else if (inside) {
    add_slots_of_tiles<Int>(p, network, sum, first_class, image, row, column);
  }
  for (float& gradient : sum) gradient *= scale;
  if (network.scale) {
    const int64_t piece = (image * height + row) * column_blocks + column_block;
    by_raw_logits(p, network, sum, first_class, image, row, column, inside, piece);
  }
  for (int i = 0; inside && i < kFinishClasses; ++i) {
    if (first_class + i < end_class) write(to + i * height * width, sum[i]);
  }
}

// Pieces of a gradient, each a row of an image by kFinishThreads columns; a block has some classes of one.
inline int64_t finish_pieces(int64_t batch, const Network& network) {
  return batch * network.rows.coarse * ((network.columns.coarse + kFinishThreads - 1) / kFinishThreads);
}

inline int64_t finish_blocks(const Problem& p, const Network& network) {
  return finish_pieces(p.batch, network) * ((p.classes + kFinishClasses - 1) / kFinishClasses);
}

// The loss and its terms from the sums of `parts` blocks, by one block of threads. `inverse`: of the number of valid pixels.
HK_DEVICE void finish_loss(const Problem& p, int64_t parts, float inverse) {
  SharedAllocator memory(dynamic_shared_memory());
  const CommonArrays arrays(memory, ClassOrder(1, 1));
  const Shared<double> scratch[2] = {memory.take<double>(kScratch), memory.take<double>(kScratch)};
  double sum[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) {
    sum[0] += read(p.output.partial + 2 * i);
    sum[1] += read(p.output.partial + 2 * i + 1);
  }
  float value[2];
  for (int term = 0; term < 2; ++term) {
    const float divided = p.term[term].divisor == Divisor::kCount ? inverse : inverse_divisor(p.term[term], arrays.scratch[term]);
    value[term] = static_cast<float>(sum_over_block(sum[term], scratch[term])) * divided * p.term[term].share;
    if (threadIdx.x == 0) write(p.output.term[term], value[term]);
  }
  if (threadIdx.x == 0) write(p.output.loss, p.term[0].weight * value[0] + p.term[1].weight * value[1]);
}

struct Finish {
  float *student, *teacher;                 // the gradients [B, K, h, w]
  int64_t student_blocks, teacher_blocks;
  int64_t parts;                            // blocks of the main launch; their sums become the loss unless it is a map
  bool deferred;                            // gradients lack the number of valid pixels as divisor
};

// Blocks [0, student_blocks) and the `teacher_blocks` after them finish gradients, one more the loss. `Narrow`: both networks'
// positions are, and are calculated in 32 bits. Six blocks to a multiprocessor: told no number, the compiler spills.
template <bool Narrow>
static __global__ void __launch_bounds__(kFinishThreads, 6) finish_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish f) {
  using Int = std::conditional_t<Narrow, int32_t, int64_t>;
  const float valid = static_cast<float>(read_back(p.output.valid)), inverse = valid == 0.f ? 0.f : 1.f / valid;
  const float scale = f.deferred ? inverse : 1.f;
  const int64_t block = blockIdx.x, of_teacher = block - f.student_blocks;
  if (of_teacher >= f.teacher_blocks) return finish_loss(p, f.parts, inverse);
  const bool student = of_teacher < 0;
  const Network network = student ? p.student : p.teacher;
  finish_network<Int>(p, network, student ? f.student : f.teacher, Int(student ? block : of_teacher), scale);
}

struct NormalizationSums {
  const float* parts[2];  // of student and teacher [pieces, 2, K]
  float* out[2];          // [2, K], or null
  int64_t pieces[2];
};

// The gradients of scales and shifts, each by a block: those of the student, then the teacher's, where they are wanted.
HK_KERNEL void __launch_bounds__(kFinishThreads) normalization_kernel(const NormalizationSums n, int columns) {
  SharedAllocator memory(dynamic_shared_memory());
  const Shared<double> scratch = memory.take<double>(kScratch);
  const int which = !n.out[0] || int(blockIdx.x) >= columns, at = static_cast<int>(blockIdx.x) % columns;
  const float* parts = which ? n.parts[1] : n.parts[0];
  const int64_t pieces = which ? n.pieces[1] : n.pieces[0];
  double sum = 0;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) sum += read(parts + piece * columns + at);
  sum = sum_over_block(sum, scratch);
  if (threadIdx.x == 0) write((which ? n.out[1] : n.out[0]) + at, static_cast<float>(sum));
}

constexpr int64_t kFinishSharedBytes = 4 * kScratch * 4 + 16 + 2 * kScratch * 8;

}  // namespace hetero::cuda
