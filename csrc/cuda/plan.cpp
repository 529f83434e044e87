#include "projected_losses.h"

#include <algorithm>
#include <stdexcept>

namespace hetero::cuda {

namespace {

constexpr int kThreads = 128, kMostRows = 64;
constexpr int kFewestRows = 4;     // below that, staging and slots cost more than more blocks gain
constexpr int kBlocksPerCard = 4;  // blocks for each multiprocessor that a call should have
constexpr int kReservedBytes = 1024;  // of shared memory, that the driver takes for each block
constexpr int kStreamedSlots = 4;     // slices under way, where they do not stay

}  // namespace

Plan make_plan(const PlanRequest& r, const Card& card) {
  Plan plan{};
  const auto network = [&](GridSize size) {
    return NetworkPlan{ExactAxis::make(r.loss.height, size.height, r.align_corners),
                       ExactAxis::make(r.loss.width, size.width, r.align_corners)};
  };
  plan.student = network(r.student);
  plan.teacher = r.has_teacher ? network(r.teacher) : plan.student;
  plan.lanes = lanes_per_pixel(r.classes);

  int columns = kThreads / plan.lanes;
  while (columns / 2 >= r.loss.width && columns / 2 * plan.lanes >= 32) columns /= 2;
  for (;; columns /= 2) {
    plan.columns = AxisTiles::make(plan.student.columns, columns);
    // A network that has the loss grid's rows is staged row by row: nothing is lost by short tiles.
    const int fewest = plan.student.rows.identity || plan.teacher.rows.identity ? 1 : kFewestRows;
    for (int rows = kMostRows;; rows /= 2) {
      plan.rows = AxisTiles::make(plan.student.rows, rows);
      plan.blocks = r.batch * plan.rows.count * plan.columns.count;
      if (rows <= fewest || plan.blocks >= int64_t(card.multiprocessors) * kBlocksPerCard) break;
    }
    const int classes = static_cast<int>(r.classes);
    plan.shared_bytes = common_bytes(ClassOrder(classes, plan.lanes)) + label_bytes(plan.rows.size, columns);
    for (NetworkPlan* n : {&plan.student, &plan.teacher}) {
      n->span = plan.columns.widest_reach(n->columns);
      n->slot_rows = plan.rows.widest_reach(n->rows);
      if (n == &plan.teacher && !r.has_teacher) continue;
      plan.shared_bytes += network_bytes(classes, plan.lanes, n->span, plan.rows.size, columns,
                                         n == &plan.student ? r.student_gradient : r.teacher_gradient);
    }
    if (plan.shared_bytes <= card.shared_per_block) break;
    if (columns == 1) {
      throw std::runtime_error(std::to_string(r.classes) + " classes need " + std::to_string(plan.shared_bytes) +
                               " bytes of shared memory and this card has " + std::to_string(card.shared_per_block) +
                               "; use backend='triton'");
    }
  }
  plan.threads = std::max(32, columns * plan.lanes);
  plan.blocks_per_multiprocessor =
      static_cast<int>(std::min<int64_t>(card.shared_per_multiprocessor / (plan.shared_bytes + kReservedBytes),
                                         card.threads_per_multiprocessor / plan.threads));
  return plan;
}

Plan plan_of(const Arguments& a, const Card& card, bool scores) {
  const GridSize student{a.student.height, a.student.width}, labels{a.label_height, a.label_width};
  return make_plan({a.batch, a.classes, a.label_resolution ? labels : student, student, {a.teacher.height, a.teacher.width},
                    a.has_teacher, scores || a.student.gradient != nullptr, a.teacher.gradient != nullptr, a.align_corners},
                   card);
}

namespace {

// Shared memory of the main launch on features (ProjectedTile, Weights and the slices, as the kernel takes them).
int64_t projected_bytes(const ProjectedPlan& plan, const ProjectedRequest& r, int element_bytes) {
  const int classes = static_cast<int>(r.classes);
  int64_t bytes = common_bytes(ClassOrder(1, 1)) + 4 * array_bytes(8 * class_tiles_of(classes) * class_pitch(plan.pixels), 4) +
                  array_bytes(kWarps * kRoundFragments * 4 * 32, 4) + array_bytes(2, 4) + array_bytes(plan.pixels, 4) +
                  2 * array_bytes(classes, 4);
  if (plan.resident) {
    for (const int64_t channels : r.channels) bytes += array_bytes(r.classes * weight_pitch(slices_of(channels)), 4);
  }
  return bytes + array_bytes(int64_t(plan.slots) * kWarps * slice_words(plan.pixels, element_bytes), 4);
}

}  // namespace

ProjectedPlan make_plan(const ProjectedRequest& r, const Card& card) {
  ProjectedPlan plan{};
  const int slices[2] = {slices_of(r.channels[0]), slices_of(r.channels[1])};
  const int all = (slices[0] + slices[1] + kWarps - 1) / kWarps;  // of a warp
  const int tiles = class_tiles_of(r.classes), element_bytes = std::max(r.element_bytes[0], r.element_bytes[1]);
  plan.class_tiles = tiles <= kFewClassTiles ? kFewClassTiles : tiles <= kManyClassTiles ? kManyClassTiles : kMostClassTiles;
  plan.threads = kFeatureThreads;
  const auto fits = [&](int pixels, int slots, bool resident) {
    plan.pixels = pixels;
    plan.slots = slots;
    plan.resident = resident;
    plan.shared_bytes = projected_bytes(plan, r, element_bytes);
    return plan.shared_bytes <= card.shared_per_block;
  };
  plan.on_chip = plan.class_tiles == kFewClassTiles && all <= kMostSlices &&
                 (fits(32, all, true) || fits(16, all, false));
  const int pixels = plan.class_tiles == kMostClassTiles ? 16 : 32;
  if (!plan.on_chip && !fits(pixels, std::min(all, kStreamedSlots), false) && !fits(pixels, 1, false)) {
    throw std::runtime_error(std::to_string(r.classes) + " classes of features need " + std::to_string(plan.shared_bytes) +
                             " bytes of shared memory and this card has " + std::to_string(card.shared_per_block) +
                             "; use backend='triton'");
  }
  plan.tiles = r.batch * ((r.pixels + plan.pixels - 1) / plan.pixels);
  plan.blocks = std::min<int64_t>(plan.tiles, card.multiprocessors);
  const int slices_of_warp = kWeightTiles / plan.class_tiles;
  int64_t weights = 0, elements = 0;
  for (int i = 0; i < 2; ++i) {
    plan.columns[i] = (slices[i] + kWarps * slices_of_warp - 1) / (kWarps * slices_of_warp);
    weights += r.classes * r.channels[i];
    elements += r.batch * r.pixels * r.channels[i];
  }
  // As many parts as run at once (a block fills a multiprocessor), with at most half as many elements as the features.
  const int64_t at_once = card.multiprocessors / (plan.columns[0] + plan.columns[1]);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({at_once, elements / (2 * weights), plan.tiles})));
  plan.weight_slots = std::min(slices_of_warp + 1, kStreamedSlots);
  plan.weight_shared_bytes = 2 * array_bytes(8 * tiles * class_pitch(plan.pixels), 4) +
                             array_bytes(int64_t(plan.weight_slots) * kWarps * slice_words(plan.pixels, element_bytes), 4);
  return plan;
}

ProjectedPlan plan_of(const Arguments& a, const FeatureArguments& student, const FeatureArguments& teacher, const Card& card) {
  const auto bytes = [](const FeatureArguments& f) { return f.dtype == DType::kFloat ? 4 : 2; };
  return make_plan({a.batch, a.classes, a.student.height * a.student.width, {student.channels, teacher.channels},
                    {bytes(student), bytes(teacher)}}, card);
}

}  // namespace hetero::cuda
