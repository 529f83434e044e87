// The host module `hetero_kernels._host`: what the libraries were built with, which CPU instruction set runs, and how the
// CUDA kernels would be launched. It needs neither torch nor CUDA, so that it still answers where a library cannot be loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "build_facts.h"
#include "cpu/core/instruction_set.h"
#include "cuda/pixel_losses/plan.h"
#include "cuda/projected_losses/projected_plan.h"
#include "cuda/projection/projection_plan.h"

namespace py = pybind11;

namespace {

using Size = std::pair<int64_t, int64_t>;

py::dict cuda_plan(int64_t batch, int64_t classes, Size loss, Size student, std::optional<Size> teacher, bool student_gradient,
                   bool teacher_gradient, bool align_corners, int multiprocessors, int64_t shared_per_block,
                   int64_t shared_per_multiprocessor, int threads_per_multiprocessor) {
  const Size other = teacher.value_or(student);
  const hetero::cuda::Plan plan = hetero::cuda::make_plan(
      {batch, classes, {loss.first, loss.second}, {student.first, student.second}, {other.first, other.second},
       teacher.has_value(), student_gradient, teacher_gradient, align_corners},
      {multiprocessors, shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor});
  py::dict out;
  out["tile"] = py::make_tuple(plan.rows.size, plan.columns.size);
  out["tiles"] = py::make_tuple(plan.rows.count, plan.columns.count);
  out["lanes"] = plan.lanes;
  out["threads"] = plan.threads;
  out["blocks"] = plan.blocks;
  out["shared_bytes"] = plan.shared_bytes;
  out["blocks_per_multiprocessor"] = plan.blocks_per_multiprocessor;
  return out;
}

py::dict cuda_projected_plan(int64_t batch, int64_t classes, Size grid, int64_t student_channels, int64_t teacher_channels,
                             int student_bytes, int teacher_bytes, int multiprocessors, int64_t shared_per_block,
                             int64_t shared_per_multiprocessor, int threads_per_multiprocessor) {
  const hetero::cuda::ProjectedPlan plan = hetero::cuda::make_plan(
      hetero::cuda::ProjectedRequest{batch, classes, grid.first * grid.second, {student_channels, teacher_channels},
                                     {student_bytes, teacher_bytes}},
      {multiprocessors, shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor});
  py::dict out;
  out["pixels"] = plan.pixels;
  out["class_tiles"] = plan.class_tiles;
  out["on_chip"] = plan.on_chip;
  out["resident_weights"] = plan.resident;
  out["slots"] = plan.slots;
  out["threads"] = plan.threads;
  out["tiles"] = plan.tiles;
  out["blocks"] = plan.blocks;
  out["shared_bytes"] = plan.shared_bytes;
  out["weight_columns"] = py::make_tuple(plan.columns[0], plan.columns[1]);
  out["weight_splits"] = plan.splits;
  out["weight_slots"] = plan.weight_slots;
  out["weight_shared_bytes"] = plan.weight_shared_bytes;
  return out;
}

py::dict cuda_projection_plan(int64_t batch, int64_t classes, Size grid, int64_t channels, int element_bytes, int multiprocessors,
                              int64_t shared_per_block) {
  hetero::cuda::Card card;
  card.multiprocessors = multiprocessors;
  card.shared_per_block = shared_per_block;
  const hetero::cuda::ProjectionPlan plan = hetero::cuda::make_plan(
      hetero::cuda::ProjectionRequest{batch, classes, grid.first * grid.second, channels, element_bytes}, card);
  py::dict out;
  out["pixels"] = plan.pixels;
  out["class_tiles"] = plan.class_tiles;
  out["chunks"] = plan.chunks;
  out["groups"] = plan.groups;
  out["slots"] = plan.slots;
  out["tiles"] = plan.tiles;
  out["blocks"] = plan.blocks;
  out["shared_bytes"] = plan.shared_bytes;
  out["weight_pixels"] = plan.weight_pixels;
  out["weight_columns"] = plan.columns;
  out["weight_splits"] = plan.splits;
  out["weight_slots"] = plan.weight_slots;
  out["weight_tiles"] = plan.weight_tiles;
  out["weight_shared_bytes"] = plan.weight_shared_bytes;
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "Build facts of hetero_kernels' compiled libraries.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = hetero::kBuildFacts.torch;
        info["compiler"] = hetero::kBuildFacts.compiler;
        info["cuda"] = hetero::kBuildFacts.cuda;
        info["cuda_architectures"] = hetero::kBuildFacts.cuda_architectures;
        info["no_cuda"] = hetero::kBuildFacts.no_cuda;
        return info;
      },
      "dict: torch the build ran against, the C++ compiler, the CUDA library's version and architectures in CMake's notation "
      "(empty: none was built), and why none was (empty: one was).");
  m.def("instruction_sets", &hetero::cpu::instruction_sets,
        "Instruction sets this machine runs and this build contains, best first.");
  m.def("active_instruction_set", &hetero::cpu::active_instruction_set,
        "The one that runs now; HETERO_KERNELS_CPU_ISA forces one. Raises RuntimeError if that one cannot run.");
  const hetero::cuda::Card card;
  m.def("cuda_plan", &cuda_plan,
        "How a pixel loss's main kernel is launched, for a card: tile (rows, columns) of the loss grid, tiles of an image, lanes "
        "that share a pixel, threads and shared bytes of a block, blocks, and blocks that fit a multiprocessor by threads and "
        "shared memory. Sizes are (height, width). Raises RuntimeError where nothing fits.",
        py::arg("batch"), py::arg("classes"), py::arg("loss"), py::arg("student"), py::arg("teacher") = py::none(),
        py::arg("student_gradient") = true, py::arg("teacher_gradient") = false, py::arg("align_corners") = false,
        py::arg("multiprocessors") = card.multiprocessors, py::arg("shared_per_block") = card.shared_per_block,
        py::arg("shared_per_multiprocessor") = card.shared_per_multiprocessor,
        py::arg("threads_per_multiprocessor") = card.threads_per_multiprocessor);
  m.def("cuda_projected_plan", &cuda_projected_plan,
        "How the loss on features is launched, for a card: pixels of a tile, tiles of 8 classes that the kernel is compiled for, "
        "whether the weights' gradient comes from the tile on chip, whether the weights lie in shared memory, slices that a warp "
        "has on chip or under way, threads and shared bytes of a block, tiles and blocks; and of the launch that reads the "
        "features again: blocks of channels of both networks, parts, slots, shared bytes. Raises RuntimeError where nothing fits.",
        py::arg("batch"), py::arg("classes"), py::arg("grid"), py::arg("student_channels"), py::arg("teacher_channels"),
        py::arg("student_bytes") = 4, py::arg("teacher_bytes") = 4, py::arg("multiprocessors") = card.multiprocessors,
        py::arg("shared_per_block") = card.shared_per_block,
        py::arg("shared_per_multiprocessor") = card.shared_per_multiprocessor,
        py::arg("threads_per_multiprocessor") = card.threads_per_multiprocessor);
  m.def("cuda_projection_plan", &cuda_projection_plan,
        "How a projection is launched, for a card: pixels of a tile, tiles of 8 classes that the kernel is compiled for, chunks of "
        "so many classes, tiles of a block, slices that a warp has under way, tiles, blocks and shared bytes of a block; and of the "
        "weight's gradient: pixels of a tile, blocks of channels, parts, slots, tiles, shared bytes. Raises RuntimeError where "
        "nothing fits.",
        py::arg("batch"), py::arg("classes"), py::arg("grid"), py::arg("channels"), py::arg("element_bytes") = 4,
        py::arg("multiprocessors") = card.multiprocessors, py::arg("shared_per_block") = card.shared_per_block);
}
