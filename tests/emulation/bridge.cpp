// What Python sees of the emulation: the losses on host memory, from the launchers that nvcc compiles too.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../../csrc/cuda/hakd_launch.cuh"
#include "../../csrc/cuda/segmentation_launch.cuh"
#include "selftest.h"

namespace py = pybind11;
using namespace hetero::cuda;

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

Logits logits(const Array& x, const Maybe& gradient, const char* name) {
  x.watch(name);
  if (gradient) gradient->watch("gradient");
  const DType dtype = x.dtype == "float32" ? DType::kFloat : x.dtype == "bfloat16" ? DType::kBFloat16 : DType::kHalf;
  return {x.pointer(), dtype, {x.stride[0], x.stride[1], x.stride[2], x.stride[3]}, x.shape[2], x.shape[3],
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

Runtime runtime(const Card& card) { return {emulation::allocate, nullptr, card}; }

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

PYBIND11_MODULE(HK_MODULE, m) {
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
    guarded([&] { hakd_launches(call.arguments(), kmm, kem, cross_entropy, runtime(card)); });
  });
  m.def("segmentation_loss", [](const Given& call, const Maybe& class_weight, double label_smoothing, const Card& card) {
    guarded([&] {
      if (class_weight) class_weight->watch("class_weight");
      const float* weight = class_weight ? static_cast<const float*>(class_weight->pointer()) : nullptr;
      segmentation_launches(call.arguments(), weight, label_smoothing, runtime(card));
    });
  });
  m.def("set_order", [](int order, unsigned seed) { emulation::set_order(static_cast<emulation::Order>(order), seed); });
  m.def("take_traffic", [] {
    const emulation::Traffic t = emulation::traffic();
    emulation::traffic() = {};
    return py::make_tuple(t.read, t.written, t.launches, t.names);
  });
  m.def("selftest", &selftest::run, "Runs a kernel with a known mistake, or none, by name.");
}
