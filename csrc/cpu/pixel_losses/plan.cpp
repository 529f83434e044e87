#include "plan.h"

#include <algorithm>

#include "../../pixel/interpolation.h"

namespace hetero::cpu {

namespace {

constexpr int64_t kMaxItemRows = 64;     // bounds the rows that one float sum runs over, and feeds many threads
constexpr int64_t kFlatItemRows = 2;     // where every network is read row by row
constexpr int64_t kTileBytes = 512 << 10;

}  // namespace

template <class Real>
AxisTable<Real>::AxisTable(int64_t fine, int64_t coarse, bool align_corners, bool columns) : identity(fine == coarse) {
  const int64_t padded = fine + kMaxLanes;
  lower.resize(padded);
  upper.resize(padded);
  fraction.resize(padded);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t index = std::min(i, fine - 1);
    const SourcePosition position = identity ? SourcePosition{index, 0.0} : source_position(index, fine, coarse, align_corners);
    lower[i] = static_cast<int32_t>(position.lower);
    upper[i] = static_cast<int32_t>(identity ? index : std::min(position.lower + 1, coarse - 1));
    fraction[i] = static_cast<Real>(position.fraction);
    if (columns && !identity && position.fraction == 0) {
      upper[i] = lower[i];
      fraction[i] = Real(0.5);
    }
  }
}

std::vector<int32_t> nearest_table(int64_t fine, int64_t coarse) {
  std::vector<int32_t> table(fine);
  for (int64_t i = 0; i < fine; ++i) table[i] = static_cast<int32_t>(fine == coarse ? i : nearest_index(i, fine, coarse));
  return table;
}

template <class Real>
std::vector<Item> make_items(int64_t batch, int64_t height, const std::vector<const AxisTable<Real>*>& rows) {
  const bool flat = std::all_of(rows.begin(), rows.end(), [](auto* r) { return r->identity; });
  std::vector<Item> image;
  for (int64_t begin = 0; begin < height;) {
    int64_t end = begin + 1;
    const auto joins = [&](const AxisTable<Real>* r) { return r->identity || r->lower[end] == r->lower[begin]; };
    while (end < height && end - begin < (flat ? kFlatItemRows : kMaxItemRows) && std::all_of(rows.begin(), rows.end(), joins)) {
      ++end;
    }
    image.push_back({0, begin, end});
    begin = end;
  }
  std::vector<Item> items;
  items.reserve(image.size() * batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (const Item& item : image) items.push_back({b, item.row_begin, item.row_end});
  }
  return items;
}

int columns_per_block(int64_t width, int64_t classes, int planes, int element_bytes, int lanes) {
  const int64_t columns = std::min<int64_t>(kTileBytes / (classes * planes * element_bytes), kMaxBlock);
  const int64_t whole = round_up(width, lanes);
  return static_cast<int>(std::clamp<int64_t>(columns / lanes * lanes, lanes, whole));
}

template <class Real>
void add_slots(const Real* slots, const std::vector<Item>& items, const AxisTable<Real>& rows, int64_t batch,
               int64_t classes, int64_t height, int64_t width, Real* gradient, const Runtime& runtime) {
  if (batch == 0) return;
  const int64_t per_image = static_cast<int64_t>(items.size()) / batch;
  const auto lower_of = [&](int64_t item) { return int64_t(rows.lower[items[item].row_begin]); };
  runtime.parallel(batch * height, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / height, y = index % height;
      // Items are sorted by their upper coarse row: those that start at y - 1 or y touch row y.
      int64_t first = image * per_image;
      for (int64_t last = first + per_image; first < last;) {
        const int64_t middle = (first + last) / 2;
        lower_of(middle) < y - 1 ? first = middle + 1 : last = middle;
      }
      const int64_t stop = (image + 1) * per_image;
      for (int64_t c = 0; c < classes; ++c) {
        Real* out = gradient + ((image * classes + c) * height + y) * width;
        std::fill(out, out + width, Real(0));
        for (int64_t item = first; item < stop && lower_of(item) <= y; ++item) {
          const int64_t row = items[item].row_begin;
          for (int side = 0; side < 2; ++side) {
            if ((side == 0 ? rows.lower[row] : rows.upper[row]) != y) continue;
            const Real* slot = slots + ((item * 2 + side) * classes + c) * width;
            for (int64_t x = 0; x < width; ++x) out[x] += slot[x];
          }
        }
      }
    }
  });
}

template struct AxisTable<float>;
template struct AxisTable<double>;
template std::vector<Item> make_items(int64_t, int64_t, const std::vector<const AxisTable<float>*>&);
template std::vector<Item> make_items(int64_t, int64_t, const std::vector<const AxisTable<double>*>&);
template void add_slots(const float*, const std::vector<Item>&, const AxisTable<float>&, int64_t, int64_t, int64_t,
                        int64_t, float*, const Runtime&);
template void add_slots(const double*, const std::vector<Item>&, const AxisTable<double>&, int64_t, int64_t, int64_t,
                        int64_t, double*, const Runtime&);

}  // namespace hetero::cpu
