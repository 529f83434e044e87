// What Python sees of the emulation: the losses on host memory, by the functions that the registrations of csrc/cuda/torch
// call. Kernels and launchers are translation units of their own, those that nvcc compiles too (build.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../../csrc/cuda/projected_losses/projected_losses.h"
#include "../../csrc/cuda/projection/projection.h"
#include "accesses.h"
#include "emulation.h"
#include "selftest.h"

namespace py = pybind11;
using namespace hetero::cuda;
using hetero::LabelType;
using hetero::Reduction;

namespace {

// A tensor as Python describes it: memory, shape and strides in elements, dtype's name, and the storage it lies in.
struct Array {
  uint64_t data, storage;
  int64_t storage_bytes;
  std::vector<int64_t> shape, stride;
  std::string dtype;
  bool writable;

  void* pointer() const { return reinterpret_cast<void*>(data); }
  void watch(const char* name) const {
    emulation::add_buffer(name, reinterpret_cast<void*>(storage), storage_bytes, writable);
  }
};

using Maybe = std::optional<Array>;

DType dtype_of(const Array& x) {
  return x.dtype == "float32" ? DType::kFloat : x.dtype == "bfloat16" ? DType::kBFloat16 : DType::kHalf;
}

Logits logits(const Array& x, const Maybe& gradient, const char* name) {
  x.watch(name);
  if (gradient) gradient->watch("gradient");
  return {x.pointer(), dtype_of(x), {x.stride[0], x.stride[1], x.stride[2], x.stride[3]}, x.shape[2], x.shape[3],
          gradient ? static_cast<float*>(gradient->pointer()) : nullptr};
}

struct Given {
  Array student;
  Maybe teacher, student_gradient, teacher_gradient, upstream;
  Array labels;
  std::vector<Maybe> normalizers;
  std::vector<Array> outputs;
  bool label_resolution, align_corners;
  int64_t ignore_index;
  std::string reduction;
  double temperature;
  std::vector<double> weights;

  Arguments arguments() const {
    Arguments a{};
    a.batch = student.shape[0];
    a.classes = student.shape[1];
    a.student = logits(student, student_gradient, "student");
    a.has_teacher = teacher.has_value();
    if (teacher) a.teacher = logits(*teacher, teacher_gradient, "teacher");
    labels.watch("labels");
    a.labels = labels.pointer();
    a.label_type = labels.dtype == "int64" ? LabelType::kInt64 : labels.dtype == "int32" ? LabelType::kInt32 : LabelType::kUInt8;
    for (int i = 0; i < 3; ++i) a.label_stride[i] = labels.stride[i];
    a.label_height = labels.shape[1];
    a.label_width = labels.shape[2];
    a.label_resolution = label_resolution;
    a.align_corners = align_corners;
    a.ignore_index = ignore_index;
    a.reduction = reduction == "mean" ? Reduction::kMean : reduction == "sum" ? Reduction::kSum : Reduction::kNone;
    a.temperature = temperature;
    float** outs[3] = {&a.loss, &a.term[0], &a.term[1]};
    for (int i = 0; i < 3; ++i) {
      outputs[i].watch("output");
      *outs[i] = static_cast<float*>(outputs[i].pointer());
    }
    for (int i = 0; i < 2; ++i) {
      a.weight[i] = weights[i];
      if (!normalizers[i]) continue;
      normalizers[i]->watch("normalizer");
      a.normalizer[i] = static_cast<const float*>(normalizers[i]->pointer());
    }
    if (upstream) {
      upstream->watch("upstream");
      a.upstream = static_cast<const float*>(upstream->pointer());
      for (int i = 0; i < 3; ++i) a.upstream_stride[i] = upstream->stride[i];
    }
    return a;
  }
};

// A network's features, weight [K, C], bias [K], and gradients of logits, weight and bias.
FeatureArguments features(const std::string& name, const Array& x, const Array& weight, const Maybe& bias,
                          const std::vector<Maybe>& gradients) {
  weight.watch((name + "_weight").c_str());
  FeatureArguments f{x.pointer(), dtype_of(x), {}, x.shape[1], {}, {}, nullptr, nullptr, nullptr};
  for (int i = 0; i < 4; ++i) f.stride[i] = x.stride[i];
  f.weight = {weight.pointer(), dtype_of(weight), {weight.stride[0], weight.stride[1]}};
  if (bias) {
    bias->watch((name + "_bias").c_str());
    f.bias = {bias->pointer(), dtype_of(*bias), {bias->stride[0], 0}};
  }
  const char* names[3] = {"_logit_gradient", "_weight_gradient", "_bias_gradient"};
  float** outs[3] = {&f.logit_gradient, &f.weight_gradient, &f.bias_gradient};
  for (int i = 0; i < 3; ++i) {
    if (!gradients[i]) continue;
    gradients[i]->watch((name + names[i]).c_str());
    *outs[i] = static_cast<float*>(gradients[i]->pointer());
  }
  return f;
}

// Scale, shift and the place of their gradient, for logits that are raw.
void normalize(Logits& logits, const std::vector<Maybe>& normalization, bool relu) {
  const char* names[3] = {"scale", "shift", "normalization_gradient"};
  for (int i = 0; i < 3; ++i) {
    if (normalization[i]) normalization[i]->watch(names[i]);
  }
  logits.scale = static_cast<const float*>(normalization[0]->pointer());
  logits.shift = static_cast<const float*>(normalization[1]->pointer());
  logits.relu = relu;
  if (normalization[2]) logits.normalization_gradient = static_cast<float*>(normalization[2]->pointer());
}

template <class T>
T* watched(const Maybe& x, const char* name) {
  if (!x) return nullptr;
  x->watch(name);
  return static_cast<T*>(x->pointer());
}

// Features and weight of a projection, and what features are rounded to.
struct Projection {
  Array features, weight;
  std::string rounding;

  ProjectionArguments arguments() const {
    features.watch("features");
    return {features.shape[0], weight.shape[0], features.shape[2], features.shape[3],
            ::features("", features, weight, std::nullopt, {std::nullopt, std::nullopt, std::nullopt}),
            rounding == "bfloat16" ? DType::kBFloat16 : rounding == "float16" ? DType::kHalf : DType::kFloat};
  }
};

// Of the logits' own gradient, the logits, their statistics and the gradient of these; the logits are there, the rest may be.
LogitGradient logit_gradient(const std::vector<Maybe>& given, int64_t pixels) {
  return {watched<float>(given[0], "logit_gradient"), watched<float>(given[1], "logits"), watched<double>(given[2], "statistics"),
          watched<double>(given[3], "statistics_gradient"), pixels > 0 ? 1.0 / static_cast<double>(pixels) : 0.0};
}

// Cards of another size are other devices.
Runtime runtime(const Card& card) {
  return {emulation::allocate, nullptr, card, static_cast<int>(card.shared_per_block >> 10)};
}

// Runs `body` and gives back what it was lent, whatever happens.
template <class Body>
void guarded(Body body) {
  try {
    body();
  } catch (...) {
    try {
      emulation::release_buffers();
    } catch (...) {  // the first failure says more
    }
    throw;
  }
  emulation::release_buffers();
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  py::class_<Card>(m, "Card")
      .def(py::init<>())
      .def_readwrite("multiprocessors", &Card::multiprocessors)
      .def_readwrite("shared_per_block", &Card::shared_per_block)
      .def_readwrite("shared_per_multiprocessor", &Card::shared_per_multiprocessor);
  py::class_<Array>(m, "Array").def(py::init([](uint64_t data, uint64_t storage, int64_t bytes, std::vector<int64_t> shape,
                                                std::vector<int64_t> stride, std::string dtype, bool writable) {
    return Array{data, storage, bytes, std::move(shape), std::move(stride), std::move(dtype), writable};
  }));
  py::class_<Given>(m, "Call").def(
      py::init([](Array student, Maybe teacher, Maybe student_gradient, Maybe teacher_gradient, Maybe upstream, Array labels,
                  std::vector<Maybe> normalizers, std::vector<Array> outputs, bool label_resolution, bool align_corners,
                  int64_t ignore_index, std::string reduction, double temperature, std::vector<double> weights) {
        return Given{student, teacher, student_gradient, teacher_gradient, upstream, labels, normalizers, outputs,
                    label_resolution, align_corners, ignore_index, reduction, temperature, weights};
      }));
  m.def("hakd_loss", [](const Given& call, bool kmm, int kem, bool cross_entropy, const Card& card) {
    guarded([&] { hakd_loss(call.arguments(), kmm, kem, cross_entropy, runtime(card)); });
  });
  m.def("normalized_hakd_loss", [](const Given& call, const std::vector<Maybe>& student, bool student_relu,
                                   const std::vector<Maybe>& teacher, bool teacher_relu, bool kmm, int kem, bool cross_entropy,
                                   const Card& card) {
    guarded([&] {
      Arguments a = call.arguments();
      normalize(a.student, student, student_relu);
      normalize(a.teacher, teacher, teacher_relu);
      hakd_loss(a, kmm, kem, cross_entropy, runtime(card));
    });
  });
  py::class_<Projection>(m, "Projection").def(py::init([](Array features, Array weight, std::string rounding) {
    return Projection{std::move(features), std::move(weight), std::move(rounding)};
  }));
  m.def("project", [](const Projection& call, const Array& logits, const Maybe& pilot, const Maybe& statistics, const Card& card) {
    guarded([&] {
      logits.watch("logits");
      project(call.arguments(), static_cast<float*>(logits.pointer()), watched<float>(pilot, "pilot"),
                       watched<double>(statistics, "statistics"), runtime(card));
    });
  });
  m.def("project_weights", [](const Projection& call, const std::vector<Maybe>& gradient, const Maybe& pilot, const Array& out,
                              const Card& card) {
    guarded([&] {
      const ProjectionArguments a = call.arguments();
      out.watch("weight_gradient");
      project_weights(a, logit_gradient(gradient, a.batch * a.height * a.width), watched<float>(pilot, "pilot"),
                               static_cast<float*>(out.pointer()), runtime(card));
    });
  });
  m.def("projected_hakd_loss", [](const Given& call, const Array& student_weight, const Maybe& student_bias,
                                  const std::vector<Maybe>& student_gradients, const Array& teacher_weight,
                                  const Maybe& teacher_bias, const std::vector<Maybe>& teacher_gradients, bool kmm, int kem,
                                  bool cross_entropy, const Card& card) {
    guarded([&] {
      Arguments a = call.arguments();
      a.classes = student_weight.shape[0];
      projected_hakd_loss(a, features("student", call.student, student_weight, student_bias, student_gradients),
                         features("teacher", *call.teacher, teacher_weight, teacher_bias, teacher_gradients), kmm, kem,
                         cross_entropy, runtime(card));
    });
  });
  m.def("project_back", [](const std::vector<Maybe>& gradient, const Array& weight, const Maybe& factor, const Array& out,
                           int64_t channel_stride, int64_t pixel_stride, const Card& card) {
    guarded([&] {
      weight.watch("weight");
      out.watch("features_gradient");
      const int64_t pixels = out.shape[2] * out.shape[3];
      BackArguments a{out.shape[0], weight.shape[0], out.shape[1], pixels, logit_gradient(gradient, out.shape[0] * pixels),
                      {weight.pointer(), dtype_of(weight), {weight.stride[0], weight.stride[1]}},
                      watched<float>(factor, "factor"), out.pointer(), dtype_of(out), channel_stride, pixel_stride};
      project_back(a, runtime(card));
    });
  });
  m.def("segmentation_loss", [](const Given& call, const Maybe& class_weight, double label_smoothing, const Card& card) {
    guarded([&] {
      if (class_weight) class_weight->watch("class_weight");
      const float* weight = class_weight ? static_cast<const float*>(class_weight->pointer()) : nullptr;
      segmentation_loss(call.arguments(), weight, label_smoothing, runtime(card));
    });
  });
  m.def("set_order", [](int order, unsigned seed) { emulation::set_order(static_cast<emulation::Order>(order), seed); });
  m.def("take_traffic", [] {
    const emulation::Traffic t = emulation::traffic();
    emulation::traffic() = {};
    return py::make_tuple(t.read, t.written, t.launches, t.names, t.buffers, t.loads);
  });
  m.def("shared_limits", [] {
    py::list out;
    for (const emulation::SharedLimit& l : emulation::shared_limits()) out.append(py::make_tuple(l.name, l.device, l.bytes, l.asked));
    return out;
  });
  m.def("count_accesses", &emulation::count_accesses);
  m.def("take_requests", [] {
    py::list out;
    for (const emulation::Requests& r : emulation::take_requests()) {
      out.append(py::make_tuple(r.kernel, r.shared, r.writes, r.site, r.requests, r.taken, r.least));
    }
    return out;
  });
  m.def("multiply_tf32", &selftest::multiply, "A warp's C += A B, by fragments: [lane][register].");
  m.def("selftest", &selftest::run, "Runs a kernel with a known mistake, or none, by name.");
}
