#include "projection_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "projection.h"

namespace hetero::cuda {

namespace {

constexpr int kMostSlots = 4;

// Shared memory of `slots` slices for each warp, beside `bytes`; as few slots as fit the card, one at least.
int64_t fit_slots(int& slots, int64_t bytes, int words, const Card& card) {
  for (;; --slots) {
    const int64_t all = bytes + array_bytes(int64_t(slots) * kWarps * words, 4);
    if (all <= card.shared_per_block) return all;
    if (slots == 1) {
      throw std::runtime_error("a projection needs " + std::to_string(all) + " bytes of shared memory and this card has " +
                               std::to_string(card.shared_per_block) + "; use backend='triton'");
    }
  }
}

}  // namespace

ProjectionPlan make_plan(const ProjectionRequest& r, const Card& card) {
  ProjectionPlan plan{};
  const int tiles_of_classes = class_tiles_of(r.classes), slices = slices_of(r.channels);
  plan.class_tiles = tiles_of_classes <= kFewClassTiles    ? kFewClassTiles
                     : tiles_of_classes <= kManyClassTiles ? kManyClassTiles
                                                           : kMostClassTiles;
  plan.pixels = plan.class_tiles == kMostClassTiles ? 16 : 32;
  plan.chunks = (tiles_of_classes + plan.class_tiles - 1) / plan.class_tiles;
  plan.tiles = r.batch * ((r.pixels + plan.pixels - 1) / plan.pixels);
  // Weights are read once a block: as many tiles as leave a block for every multiprocessor, else warps share channels.
  const auto blocks = [&](int groups) { return (plan.tiles + groups - 1) / groups * plan.chunks; };
  plan.groups = kWarps;
  while (plan.groups > 1 && blocks(plan.groups) < card.multiprocessors) plan.groups /= 2;
  plan.blocks = blocks(plan.groups);
  const int words = slice_words(plan.pixels, r.element_bytes);
  plan.slots = std::min(kMostSlots, std::max(1, (slices * plan.groups + kWarps - 1) / kWarps));
  plan.shared_bytes = fit_slots(plan.slots, array_bytes(kWarps * kRoundFragments * 4 * 32, 4), words, card);

  const int slices_of_warp = kWeightTiles / plan.class_tiles;
  plan.columns = (slices + kWarps * slices_of_warp - 1) / (kWarps * slices_of_warp);
  // As many parts as run at once (a block fills a multiprocessor), with at most a quarter of the features' elements.
  const int64_t at_once = card.multiprocessors / (plan.columns * plan.chunks);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({at_once, r.batch * r.pixels / (4 * r.classes), plan.tiles})));
  const int rows = 8 * std::min(tiles_of_classes, plan.class_tiles);
  plan.weight_slots = std::min(slices_of_warp + 1, kMostSlots);
  plan.weight_shared_bytes = fit_slots(
      plan.weight_slots, 2 * array_bytes(rows * class_pitch(plan.pixels), 4) + array_bytes(3 * rows, 4) + 2 * array_bytes(kWarps, 4),
      words, card);
  return plan;
}

ProjectionPlan plan_of(const ProjectionArguments& a, const Card& card) {
  return make_plan({a.batch, a.classes, a.height * a.width, a.features.channels, a.features.dtype == DType::kFloat ? 4 : 2}, card);
}

}  // namespace hetero::cuda
