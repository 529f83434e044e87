#include "pixel_losses.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace hetero::cuda {

namespace {

constexpr int kThreads = 128, kMostRows = 64;
constexpr int kFewestRows = 4;     // below that, staging and slots cost more than more blocks gain
constexpr int kBlocksPerCard = 4;  // blocks for each multiprocessor that a call should have
constexpr int kReservedBytes = 1024;  // of shared memory, that the driver takes for each block

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

}  // namespace hetero::cuda
