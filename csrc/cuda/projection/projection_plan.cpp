#include "projection_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "projection.h"

namespace hetero::cuda {

namespace {

constexpr int kMostSlots = 4;

// Shared memory of `slots` slices for each warp, beside `bytes`; as few slots as fit the card, `least` at least.
int64_t fit_slots(int& slots, int least, int64_t bytes, int words, const Card& card) {
  for (;; --slots) {
    const int64_t all = bytes + array_bytes(int64_t(slots) * kWarps * words, 4);
    if (all <= card.shared_per_block) return all;
    if (slots == least) {
      throw std::runtime_error("a projection needs " + std::to_string(all) + " bytes of shared memory and this card has " +
                               std::to_string(card.shared_per_block) + "; use backend='triton'");
    }
  }
}

}  // namespace

ProjectionPlan make_plan(const ProjectionRequest& r, const Card& card) {
  ProjectionPlan plan{};
  const int tiles_of_classes = class_tiles_of(r.classes), slices = slices_of(r.channels);
  for (const int compiled : {kMostClassTiles, kMoreClassTiles, kManyClassTiles, kFewClassTiles}) {
    if (tiles_of_classes <= compiled || plan.class_tiles == 0) plan.class_tiles = compiled;
  }
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
  plan.shared_bytes = fit_slots(plan.slots, 1, array_bytes(kWarps * kRoundFragments * 4 * 32, 4), words, card);

  const int of_warp = slices_of_warp(plan.class_tiles);
  plan.weight_pixels = plan.class_tiles >= kMoreClassTiles ? 16 : 32;  // whose gradient fits every card twice
  plan.weight_tiles = r.batch * ((r.pixels + plan.weight_pixels - 1) / plan.weight_pixels);
  plan.columns = (slices + kWarps * of_warp - 1) / (kWarps * of_warp);
  // As many parts as run at once (a block fills a multiprocessor), with at most a quarter of the features' elements.
  const int64_t at_once = card.multiprocessors / (plan.columns * plan.chunks);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({at_once, r.batch * r.pixels / (4 * r.classes), plan.weight_tiles})));
  const int rows = 8 * std::min(tiles_of_classes, plan.class_tiles);
  const int together = slices > kWarps ? std::min(of_warp, 2) : 1;  // a warp's slices that are multiplied at a time
  plan.weight_slots = std::min(of_warp + together, kMostSlots);
  const int64_t staged = 2 * array_bytes(rows * plan.weight_pixels, 8) + array_bytes(3 * rows, 4) + 2 * array_bytes(kWarps, 4);
  plan.weight_shared_bytes =
      fit_slots(plan.weight_slots, together, staged, slice_words(plan.weight_pixels, r.element_bytes), card);
  return plan;
}

ProjectionPlan plan_of(const ProjectionArguments& a, const Card& card) {
  return make_plan({a.batch, a.classes, a.height * a.width, a.features.channels, a.features.dtype == DType::kFloat ? 4 : 2}, card);
}

}  // namespace hetero::cuda
