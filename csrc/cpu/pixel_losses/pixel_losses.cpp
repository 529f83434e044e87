#include "pixel_losses.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "feature_grid.h"
#include "labels.h"
#include "loss_grid.h"
#include "plan.h"
#include "reduction.h"

namespace hetero::cpu {

namespace {

// Everything that both losses need around their own mathematics.
template <class Real>
class Call {
 public:
  Call(const LossArguments<Real>& a, PixelProblem<Real>& problem, const Runtime& runtime)
      : a_(a),
        problem_(problem),
        runtime_(runtime),
        grid_(a),
        student_rows_(grid_.height, a.student.height, a.align_corners, false),
        student_columns_(grid_.width, a.student.width, a.align_corners, true),
        teacher_rows_(grid_.height, (a.teacher ? *a.teacher : a.student).height, a.align_corners, false),
        teacher_columns_(grid_.width, (a.teacher ? *a.teacher : a.student).width, a.align_corners, true) {
    std::vector<const AxisTable<Real>*> rows = {&student_rows_};
    if (a.teacher) rows.push_back(&teacher_rows_);
    items_ = make_items<Real>(a.batch, grid_.height, rows);
    partial_.assign(items_.size() * 2, 0.0);

    grid_.describe(a, partial_, problem);
    problem.items = items_.data();
    problem.student = network(a.student, student_rows_, student_columns_);
    problem.has_teacher = a.teacher != nullptr;
    if (a.teacher) problem.teacher = network(*a.teacher, teacher_rows_, teacher_columns_);
    int planes = 0;
    for (const Network<Real>* n : {&problem.student, a.teacher ? &problem.teacher : nullptr}) {
      if (n != nullptr) planes += (n->rows.identity ? 1 : 2) * (n->gradient ? 2 : 1);
    }
    problem.block = columns_per_block(grid_.width, a.classes, planes, sizeof(Real), pixel_kernels<Real>().lanes);
  }

  int64_t item_count() const { return static_cast<int64_t>(items_.size()); }
  const std::vector<Item>& items() const { return items_; }

  LabelSummary check_labels(const Real* class_weight) const {
    return cpu::check_labels(problem_, class_weight, pixel_kernels<Real>(), runtime_);
  }

  // Adds up what the passes left behind.
  void finish(const LossReduction<Real>& reduction) const {
    gather(a_.student, problem_.student, student_rows_);
    if (a_.teacher) gather(*a_.teacher, problem_.teacher, teacher_rows_);
    reduction.finish(partial_, a_.batch * grid_.height * grid_.width, runtime_);
  }

  // Of the networks whose logits have a normalization, once all is added up.
  void normalize_gradients() const {
    const auto normalize = [&](const Logits<Real>& logits, const Network<Real>& network) {
      if (!network.gradient || !network.normalization) return;
      NormalizedGradient<Real> p{network, a_.batch, a_.classes, logits.normalization_gradient};
      p.network.gradient = logits.gradient;
      runtime_.parallel(a_.classes, [&](int64_t begin, int64_t end) { pixel_kernels<Real>().normalize_gradient(p, begin, end); });
    };
    normalize(a_.student, problem_.student);
    if (a_.teacher) normalize(*a_.teacher, problem_.teacher);
  }

 private:
  Network<Real> network(const Logits<Real>& logits, const AxisTable<Real>& rows, const AxisTable<Real>& columns) const {
    Network<Real> n;
    n.logits = logits.data;
    n.dtype = logits.dtype;
    std::memcpy(n.stride, logits.stride, sizeof(n.stride));
    n.height = logits.height;
    n.width = logits.width;
    n.rows = rows.view();
    n.columns = columns.view();
    n.normalization = logits.normalization;
    n.gradient = logits.gradient;
    if (logits.gradient && !rows.identity) {
      const int64_t count = static_cast<int64_t>(items_.size()) * 2 * a_.classes * logits.width;
      n.gradient = static_cast<Real*>(runtime_.allocate(count * int64_t(sizeof(Real))));
    }
    return n;
  }

  void gather(const Logits<Real>& logits, const Network<Real>& network, const AxisTable<Real>& rows) const {
    if (!network.gradient || rows.identity) return;
    add_slots<Real>(network.gradient, items_, rows, a_.batch, a_.classes, logits.height, logits.width, logits.gradient,
                    runtime_);
  }

  const LossArguments<Real>& a_;
  PixelProblem<Real>& problem_;
  const Runtime& runtime_;
  const LossGrid<Real> grid_;
  const AxisTable<Real> student_rows_, student_columns_, teacher_rows_, teacher_columns_;
  std::vector<Item> items_;
  std::vector<double> partial_;
};

// kem="spatial": what HakdProblem's members of these names hold.
template <class Real>
struct SpatialNormalizers {
  std::vector<Real> maximum, scale, scale_unguarded;
};

template <class Real>
SpatialNormalizers<Real> spatial_normalizers(const std::vector<double>& score_sums, const std::vector<Item>& items,
                                             int64_t batch, int64_t classes) {
  std::vector<double> maximum(batch * classes, 0.0), sum(batch * classes, 0.0);
  for (size_t i = 0; i < items.size(); ++i) {
    for (int64_t c = 0; c < classes; ++c) {
      const double* part = &score_sums[(i * classes + c) * 2];
      double &m = maximum[items[i].image * classes + c], &s = sum[items[i].image * classes + c];
      const double higher = std::max(m, part[0]);
      s = s * std::exp(m - higher) + part[1] * std::exp(part[0] - higher);
      m = higher;
    }
  }
  SpatialNormalizers<Real> out;
  for (size_t i = 0; i < sum.size(); ++i) {
    out.maximum.push_back(static_cast<Real>(maximum[i]));
    out.scale.push_back(static_cast<Real>(1 / sum[i]));
    out.scale_unguarded.push_back(static_cast<Real>(std::exp(-maximum[i]) / sum[i]));
  }
  return out;
}

}  // namespace

template <class Real>
void hakd_loss(const LossArguments<Real>& arguments, const HakdChoices& choices, const Runtime& runtime) {
  std::optional<FeatureGrid<Real>> grid;
  if (!arguments.label_resolution) grid.emplace(arguments, runtime);
  const LossArguments<Real>& a = grid ? grid->arguments : arguments;
  HakdProblem<Real> problem{};
  Call<Real> call(a, problem, runtime);
  problem.parameters = {static_cast<Real>(a.temperature), choices.kmm, choices.kem, choices.cross_entropy};
  const double valid = static_cast<double>(grid ? grid->valid : call.check_labels(nullptr).valid);
  const bool spatial = choices.kem == Kem::kSpatial;
  const double images = static_cast<double>(std::max<int64_t>(a.batch, 1) * a.classes);
  const LossReduction<Real> reduction(a, {spatial ? images : valid, valid}, problem);
  if (problem.teacher.gradient && problem.coefficient[1] == 0) {  // L_proj is its only source
    std::fill_n(a.teacher->gradient, a.batch * a.classes * a.teacher->height * a.teacher->width, Real(0));
    if (Real* gradient = a.teacher->normalization_gradient) std::fill_n(gradient, 2 * a.classes, Real(0));
    problem.teacher.gradient = nullptr;
  }

  std::vector<double> score_sums;
  SpatialNormalizers<Real> normalizers;
  if (spatial) {
    score_sums.assign(call.item_count() * a.classes * 2, 0.0);
    HakdProblem<Real> scores = problem;  // the same pixels, without gradients and terms
    scores.student.gradient = scores.teacher.gradient = nullptr;
    scores.maps[0] = scores.maps[1] = nullptr;
    scores.score_sums = score_sums.data();
    runtime.parallel(call.item_count(), [&](int64_t begin, int64_t end) { pixel_kernels<Real>().hakd_scores(scores, begin, end); });
    normalizers = spatial_normalizers<Real>(score_sums, call.items(), a.batch, a.classes);
    problem.spatial_maximum = normalizers.maximum.data();
    problem.spatial_scale = normalizers.scale.data();
    problem.spatial_scale_unguarded = normalizers.scale_unguarded.data();
  }
  runtime.parallel(call.item_count(), [&](int64_t begin, int64_t end) { pixel_kernels<Real>().hakd(problem, begin, end); });
  call.finish(reduction);
  call.normalize_gradients();
}

template <class Real>
void segmentation_loss(const LossArguments<Real>& a, const Real* class_weight, double label_smoothing,
                       const Runtime& runtime) {
  SegmentationProblem<Real> problem{};
  Call<Real> call(a, problem, runtime);
  const std::vector<Real> ones(class_weight ? 0 : a.classes, Real(1));
  problem.class_weight = class_weight ? class_weight : ones.data();
  double weight_sum = 0;
  for (int64_t c = 0; c < a.classes; ++c) weight_sum += problem.class_weight[c];
  problem.parameters = {static_cast<Real>(a.temperature), static_cast<Real>(label_smoothing),
                        static_cast<Real>(label_smoothing / static_cast<double>(a.classes)), static_cast<Real>(weight_sum)};
  const LabelSummary labels = call.check_labels(class_weight);
  const LossReduction<Real> reduction(a, {labels.weight, static_cast<double>(labels.valid)}, problem);
  runtime.parallel(call.item_count(), [&](int64_t begin, int64_t end) { pixel_kernels<Real>().segmentation(problem, begin, end); });
  call.finish(reduction);
}

template void hakd_loss(const LossArguments<float>&, const HakdChoices&, const Runtime&);
template void hakd_loss(const LossArguments<double>&, const HakdChoices&, const Runtime&);
template void segmentation_loss(const LossArguments<float>&, const float*, double, const Runtime&);
template void segmentation_loss(const LossArguments<double>&, const double*, double, const Runtime&);

}  // namespace hetero::cpu
