#include <algorithm>
#include <stdexcept>
#include <string>

#include "projected_losses.h"

namespace hetero::cuda {

namespace {

constexpr int kStreamedSlots = 4;  // slices under way, where they do not stay

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
  // One fits: it takes no more than the main launch did.
  for (plan.weight_slots = std::min(slices_of_warp + 1, kStreamedSlots);; --plan.weight_slots) {
    plan.weight_shared_bytes = 2 * array_bytes(8 * tiles * class_pitch(plan.pixels), 4) +
                               array_bytes(int64_t(plan.weight_slots) * kWarps * slice_words(plan.pixels, element_bytes), 4);
    if (plan.weight_shared_bytes <= card.shared_per_block || plan.weight_slots == 1) break;
  }
  return plan;
}

ProjectedPlan plan_of(const Arguments& a, const FeatureArguments& student, const FeatureArguments& teacher, const Card& card) {
  const auto bytes = [](const FeatureArguments& f) { return f.dtype == DType::kFloat ? 4 : 2; };
  return make_plan({a.batch, a.classes, a.student.height * a.student.width, {student.channels, teacher.channels},
                    {bytes(student), bytes(teacher)}}, card);
}

}  // namespace hetero::cuda
