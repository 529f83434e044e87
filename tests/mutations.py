"""Plants mistakes in a copy of the Triton or the CUDA kernels and records which test notices.

    python tests/mutations.py             # all, tables on the standard output
    python tests/mutations.py --write     # and into tests/README.md
    python tests/mutations.py wrong-halo  # by name

A mutation is a text of one file and what it becomes. The interpreter's tests, or the emulation's, run on the copy until
one fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Suite:
    """Where a backend's kernels are, and the tests that run them without a GPU."""

    name: str
    kernels: str
    tests: str
    environment: dict[str, str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name} mutations: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name} mutations: end -->"


TRITON = Suite(
    "triton",
    "hetero_kernels/triton",
    "tests/triton_backend/test_interpreted_pixel_losses.py",
    {"TRITON_INTERPRET": "1"},
)
TILINGS, FEATURES = "tests/triton_backend/test_interpreted_tuning.py", "tests/test_projected_losses.py"
PROJECTION = "tests/triton_backend/test_interpreted_projection.py"
CUDA = Suite(
    "cuda",
    "csrc/cuda",
    "tests/cuda_backend/test_emulated_pixel_losses.py",
    {},
)
CUDA_FEATURES = "tests/cuda_backend/test_emulated_projected_losses.py"
CUDA_PROJECTION = "tests/cuda_backend/test_emulated_projection.py"
CUDA_LABELS = "tests/cuda_backend/test_emulated_labels.py"
CUDA_LIMITS = "tests/cuda_backend/test_shared_limits.py"


@dataclass(frozen=True)
class Mutation:
    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest -k
    within: str = ""  # another file than the suite's
    suite: Suite = TRITON

    def path(self, root: Path = ROOT) -> Path:
        """The file that it changes, in whichever folder of the suite's kernels it is."""
        (found,) = (root / self.suite.kernels).rglob(self.file)
        return found


def cuda(name: str, what: str, file: str, old: str, new: str, tests: str, within: str = "") -> Mutation:
    return Mutation(name, what, file, old, new, tests, within, suite=CUDA)


MUTATIONS = (
    Mutation("wrong-halo", "the right neighbour is the left one", "tile.py",
             "tl.minimum(left + 1, width - 1)", "tl.minimum(left, width - 1)", "hakd_shapes and label"),
    Mutation("row-beyond", "the row below a network's last one is read", "tile.py",
             "tl.where(row + 1 < height, shown(network.stride_h), 0)", "shown(network.stride_h)",
             "hakd_shapes and label"),
    Mutation("one-round", "every round of a slot overwrites the first one's columns", "reduction.py",
             "return at[0] + SPAN, at[1] + SPAN", "return at", "rounds"),
    Mutation("lost-row", "the upper coarse row of a band gets no gradient", "reduction.py",
             "(cell < row) | (row == height - 1), 1.0, 0.0", "(row == height - 1), 1.0, 0.0",
             "hakd_shapes and label"),
    Mutation("short-reach", "the last tile that reaches a coarse column is left out", "reduction.py",
             "ok = inside & (tile <= last_tile)", "ok = inside & (tile < last_tile)", "shapes"),
    Mutation("dropped-mask", "ignored pixels have gradients", "tile.py",
             "tl.where(valid[None, :], g[i], 0.0)", "g[i]", "hakd_options or nan"),
    Mutation("dropped-padding", "logits beyond K count", "tile.py",
             "return z + tl.where(c < classes, 0.0, PADDING)", "return z", "many or thousand"),
    Mutation("missing-rescale", "the online maximum of kem='spatial' does not rescale its sum", "spatial.py",
             "sums[i] * exp_nonpositive(highest[i] - now) + e", "sums[i] + e", "spatial"),
    Mutation("missing-rescale-parts", "nor where programs are combined", "spatial.py",
             "sums = sums * exp_nonpositive(highest - now) + s * exp_nonpositive(m - now)",
             "sums = sums + s", "spatial"),
    Mutation("swapped-networks", "teacher for student in the mixture", "hakd_math.py",
             "w_h = w_s + step", "w_h = w_t - step", "hakd_options"),
    Mutation("naive-log", "log(1 + e^z) by way of 1 + e^z", "pixel_math.py",
             "f = tl.fma(e, scale, scale - 1.0)", "f = (1.0 + e) * scale - 1.0", "absolute"),
    Mutation("unguarded-large-logits", "the bounded mathematics everywhere", "launch.py",
             "return min(24.0,", "return 1e9 + min(24.0,", "large"),
    Mutation("guarded-label", "the guarded path forgets the label", "hakd_math.py",
             "return softplus(tl.where(labelled, -z, z))", "return softplus(z)", "large"),
    Mutation("unlabelled-anchor", "the anchor is evaluated as if it had no label", "hakd_math.py",
             "sign = tl.where(same, -1.0, 1.0)", "sign = tl.where(same, 1.0, 1.0)", "hakd_options"),
    Mutation("anchor-in-the-sum", "no class is kept apart: differences of numbers near 1", "segmentation_math.py",
             "error = -rest * inverse", "error = at_label * inverse - 1.0", "absolute"),
    Mutation("wrong-divisor", "the mean divides by all pixels", "tile.py",
             "counts = pixels.inside & (label != labels.ignore_index)", "counts = pixels.inside", "hakd_options"),
    Mutation("missing-upstream", "reduction='none' forgets the upstream gradient", "pixel_losses.py",
             "UPSTREAM=call.upstream is not None", "UPSTREAM=False", "none"),
    Mutation("one-divisor", "both terms have the first one's divisor", "reduction.py",
             "row += ROW * PARTS", "row += 0 * PARTS", "segmentation"),
    Mutation("sampled-low", "labels sampled by a scale that is an ulp too small", "plan.py",
             "float(np.float32(n) / np.float32(max(m, 1)))", "float(n / max(m, 1) * (1 - 1e-7))", "labels or feature"),
    Mutation("missing-temperature", "the gradient lacks the factor T", "hakd_math.py",
             "hot = temperature * hakd_factor", "hot = hakd_factor", "hakd_options"),
    Mutation("split-overlap", "a tall band's programs share a row", "tile.py",
             "end = tl.minimum(begin + ROWS,", "end = tl.minimum(begin + ROWS + 1,", "tall or coarse"),
    Mutation("loop-missing-rescale", "the loop over classes does not rescale the others' sum", "many_classes.py",
             "h_others * h_scale", "h_others", "maxima", TILINGS),
    Mutation("loop-forgotten-anchor", "the third visit has no anchor", "many_classes.py",
             "z_s, z_t, c == a, labelled", "z_s, z_t, c < 0, labelled", "looped_accuracy", TILINGS),
    Mutation("loop-empty-slots", "programs without rows leave their slots unwritten", "many_classes.py",
             "classes, CLASSES):\n            c", "visited(pixels, classes), CLASSES):\n            c", "looped_shapes",
             TILINGS),
    Mutation("loop-row-weights", "both coarse rows get the lower one's weight", "many_classes.py",
             "(g[0] * site.part[None, :],))", "(g[0] * (1.0 - site.part)[None, :],))", "looped_shapes", TILINGS),
    Mutation("small-parts", "products of float32 lose what a tensor core's 11 bits do not hold", "features.py",
             "out = tl.dot(small, y_big, out", "out = tl.dot(small * 0.0, y_big, out", "triton and values", FEATURES),
    Mutation("nan-features", "features of ignored pixels reach the weights' gradient", "features.py",
             "tl.where(valid[None, :], tl.where(c[:, None]", "tl.where(valid[None, :] | True, tl.where(c[:, None]",
             "triton and only_pixels", FEATURES),
    Mutation("lost-split", "a part of the weights' gradient is left out", "features.py",
             "for split in range(0, splits):", "for split in range(0, splits - (splits > 1)):", "triton and layouts",
             FEATURES),
    Mutation("bias-channel", "the bias's gradient is read from the last weight's column", "features.py",
             "mask=inside & (c == network.channels)", "mask=inside & (c == network.channels - 1)", "triton and values",
             FEATURES),
    Mutation("wrong-rows", "rows that do not follow each other are read as if they did", "launch.py",
             "return height == 1 or width == 1 or", "return True or", "triton and layouts", FEATURES),
    Mutation("unscaled-features", "the features' gradient lacks the incoming one", "projection.py",
             "sums *= tl.load(factor).to(tl.float32)", "sums *= 1.0", "triton and values", FEATURES),
    Mutation("no-pilot", "features far from 0 are projected as they are", "projection.py",
             "0.5 * below + 0.5 * above", "0.0", "far_from_zero", PROJECTION),
    Mutation("between-tiles", "what lies between tiles' means is no variance", "projection.py",
             "of_tile + number * off * off", "of_tile", "values and tiles", PROJECTION),
    Mutation("lost-offset", "the pilot's share of the running mean has no gradient", "projection.py",
             "g += offset.to(tl.float32) *", "g += 0.0 *", "cpus", PROJECTION),
    Mutation("nan-weights", "features that no gradient reaches count in the weights' gradient", "projection.py",
             "reached[None, :] != 0, f, 0.0", "reached[None, :] >= 0, f, 0.0", "no_gradient_reaches", PROJECTION),
    Mutation("ignored-relu", "the gradient passes a ReLU that was 0", "reduction.py",
             "<= network.floor, 0.0, g)", "<= network.floor, g, g)", "normalized", PROJECTION),
    Mutation("raw-loop", "the loop over classes reads raw logits as they are", "many_classes.py",
             "z = meant(network, c, classes, tl.load(at, mask=c < classes, other=0.0).to(tl.float32))",
             "z = tl.load(at, mask=c < classes, other=0.0).to(tl.float32)", "normalized_in_the_loop", PROJECTION),
)  # fmt: skip


# Barriers, bounds, masks and waits of the CUDA kernels, one at a time; then their arithmetic.
CUDA_MUTATIONS = (
    cuda("no-barrier-after-tables", "positions are read before all are there", "walk.cuh",
         "  __syncthreads();\n  for (int row", "  for (int row", "shapes"),
    cuda("no-barrier-after-band", "sums are taken before all threads have added theirs", "walk.cuh",
         "    __syncthreads();\n    student.leave", "    student.leave", "shapes"),
    cuda("no-barrier-after-staging", "logits are read before all are there", "walk.cuh",
         "!__syncthreads_or(beyond)", "!__any_sync(kAllLanes, beyond)", "shapes"),
    cuda("no-barrier-in-sums", "a block's sum is read before its warps' are there", "collectives.cuh",
         "  __syncthreads();\n  T sum = 0;", "  T sum = 0;", "shapes"),
    cuda("no-guard-of-outside", "threads beyond the grid take part in sums", "tile.cuh",
         "lane.inside ? sums_[at(side_ ^ lower, i, lane)] : 0.f", "sums_[at(side_ ^ lower, i, lane)]", "shapes"),
    cuda("unguarded-store", "and write them", "tile.cuh",
         "    if (lane.inside) sums_.set(at(side_ ^ lower", "    sums_.set(at(side_ ^ lower", "shapes"),
    cuda("row-beyond", "a coarse row after the last one is written", "tile.cuh",
         "    if (first_row_ + row >= network_.rows.coarse) return;\n", "", "shapes"),
    cuda("column-beyond", "threads beyond the coarse grid finish a column", "reduction.cuh",
         "const bool inside = column < width;", "const bool inside = true;", "shapes"),
    cuda("class-beyond", "classes beyond K are finished", "reduction.cuh",
         "if (first_class + i < end_class) write", "write", "shapes"),
    cuda("read-row-beyond", "the row below the last one is read", "tile.cuh",
         "!network_.rows.identity && row + 1 < network_.rows.coarse", "!network_.rows.identity", "shapes"),
    cuda("read-column-beyond", "the column after the last one is read", "tile.cuh",
         "network_.columns.identity || first_column_ + left + 1 >= network_.columns.coarse",
         "network_.columns.identity", "shapes"),
    cuda("dropped-mask", "ignored pixels have gradients", "hakd_pixel.cuh",
         "return select(valid, x, Value(0.f));", "return x;", "hakd_options or nan"),
    cuda("unmasked-terms", "and losses", "walk.cuh",
         "pixel.valid ? first.v : nothing", "first.v", "hakd_options or nan"),
    cuda("uncounted-inside", "pixels beyond the grid count", "hakd_pixel.cuh",
         "const bool valid = inside && known >= 0;", "const bool valid = known >= 0;", "shapes"),
    cuda("map-beyond", "and are written to maps", "walk.cuh",
         "return inside_ ? (tile_.image", "return true ? (tile_.image", "hakd_options or orders"),
    cuda("every-lane-speaks", "lanes that share a pixel count it each", "walk.cuh",
         "speaks_(lane.member == 0)", "speaks_(true)", "many or narrow"),
    cuda("silent-wrong-labels", "a wrong label counts for nothing", "walk.cuh",
         "pixel.wrong ? NAN : 0.f", "0.f", "wrong_labels"),
    cuda("unreduced-anchor", "lanes keep anchors of their own", "hakd_pixel.cuh",
         "    best.over_group(lanes_);\n    return", "    return", "many or narrow"),
    cuda("unreduced-sums", "lanes keep sums of their own", "hakd_pixel.cuh",
         "    add_over_group(sums, lanes_);\n    add_over_group(sums.proj", "    add_over_group(sums.proj",
         "many or narrow"),
    cuda("stale-sums", "sums of the row before stay", "tile.cuh",
         "      sums_.set(at(!side_, i, lane), 0.f);\n", "", "shapes"),
    cuda("lost-carry", "what the band before gave to this coarse row is lost", "tile.cuh",
         "if (!carried_) sums_.set", "sums_.set", "shapes"),
    cuda("lost-row", "a row that the walk jumps over is not written", "tile.cuh",
         "if (upper != upper_ + 1 && !network_.rows.identity) write_row(1", "if (false) write_row(1", "shapes"),
    cuda("nan-spreads", "at equal rows a NaN reaches the next row by 0 * NaN", "tile.cuh",
         "!network_.rows.identity && row + 1 < network_.rows.coarse", "row + 1 < network_.rows.coarse",
         "pixels_nan or same"),
    cuda("nan-carried", "and by the gradient's sums", "tile.cuh",
         "const bool next = upper == upper_ + 1 && !network_.rows.identity;", "const bool next = upper == upper_ + 1;",
         "pixels_nan or same"),
    cuda("unguarded-large-logits", "the unguarded mathematics everywhere", "tile.cuh",
         "beyond_ = beyond_ || ::fabsf(pair.upper) > limit || ::fabsf(pair.lower) > limit;", "", "large"),
    cuda("wrong-adjoint", "the gradient's horizontal weights are exchanged", "tile.cuh",
         "::fmaf(1.f - part_[x], sums_[at(side, c, x)], sum)", "::fmaf(part_[x], sums_[at(side, c, x)], sum)",
         "shapes"),
    cuda("short-reach", "the last tile that reaches a coarse column is left out", "reduction.cuh",
         "tile <= last_tile; ++tile", "tile < last_tile; ++tile", "shapes"),
    cuda("wrong-divisor", "the mean is divided by every pixel once more", "reduction.cuh",
         "const float scale = f.deferred ? inverse : 1.f;", "const float scale = inverse;", "hakd_options"),
    cuda("missing-upstream", "reduction='none' forgets the upstream gradient", "walk.cuh",
         "p_.upstream ? read(factor) : 1.f", "1.f", "none"),
    cuda("unscaled-scores", "kem='spatial' adds up tiles' scores without their maxima", "hakd.cuh",
         "sum = fma(s, math::exp_nonpositive(m - highest), sum);", "sum = sum + s;", "spatial"),
    cuda("sampled-never", "labels of another size are not sampled", "call.cuh",
         "a.label_height != rows.fine || a.label_width != columns.fine", "false", "feature"),
    # Labels.
    cuda("label-run-before", "a run is read whole that begins before the row", "labels.cuh",
         "run * kRun >= skew_ && (run", "(run", "layouts", CUDA_LABELS),
    cuda("label-run-beyond", "or one that ends beyond it", "labels.cuh",
         " && (run + 1) * kRun <= skew_ + count_;", ";", "layouts", CUDA_LABELS),
    cuda("unaligned-label-runs", "runs begin where the row does", "labels.cuh",
         "reinterpret_cast<uintptr_t>(labels) % kBytes / sizeof(T)", "0 * sizeof(T)", "layouts", CUDA_LABELS),
    # The loss on features.
    cuda("no-wait-for-slices", "slices are read before their copies have landed", "features.cuh",
         "    wait_until(ring_ - 1 - passed);\n", "", "other_shapes", CUDA_FEATURES),
    cuda("short-wait", "one copy too few is waited for", "features.cuh",
         "wait_until(ring_ - 1 - passed)", "wait_until(ring_ - passed)", "other_shapes", CUDA_FEATURES),
    cuda("no-warp-barrier-after-wait", "lanes read what other lanes copied", "features.cuh",
         "    wait_until(ring_ - 1 - passed);\n    __syncwarp();\n", "    wait_until(ring_ - 1 - passed);\n",
         "other_shapes", CUDA_FEATURES),
    cuda("no-warp-barrier-before-refill", "slots are filled that lanes still read", "features.cuh",
         "    __syncwarp();\n    next();", "    next();", "several_tiles", CUDA_FEATURES),
    cuda("no-barrier-after-parts", "logits are added up before all warps' parts are there", "projected_losses.cuh",
         "      __syncthreads();\n      for (int e", "      for (int e", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-between-rounds", "parts are overwritten that others still add up", "projected_losses.cuh",
         "      if (first > 0) __syncthreads();\n", "", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-between-networks", "and those of the other network", "projected_losses.cuh",
         "    __syncthreads();\n    beyond = block", "    beyond = block", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-after-staging-weights", "the pixels' factors and the weights are read before they are there",
         "projected_losses.cuh", "  __syncthreads();\n  PixelTerms", "  PixelTerms", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-after-logits", "logits are read before all are there", "projected_losses.cuh",
         "!__syncthreads_or(beyond)", "!__any_sync(kAllLanes, beyond)", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-after-pixels", "gradients of logits are read before all are there", "projected_losses.cuh",
         "    block.evaluate(tile, bounded, terms);\n    __syncthreads();\n",
         "    block.evaluate(tile, bounded, terms);\n", "other_shapes", CUDA_FEATURES),
    cuda("no-barrier-after-gradient", "and in the launch of its own", "projected_losses_weights.cuh",
         "    __syncthreads();\n", "", "other_shapes", CUDA_FEATURES),
    cuda("one-copy", "a tile's gradient is overwritten that others still read", "projected_losses_weights.cuh",
         ", side = !side", "", "several_tiles", CUDA_FEATURES),
    cuda("no-barrier-after-rows", "project_back reads the gradient before it is there", "projection_back.cuh",
         "          __syncthreads();\n        }\n        if (channel", "        }\n        if (channel", "other_shapes",
         CUDA_FEATURES),
    cuda("no-barrier-before-rows", "and overwrites it while others read", "projection_back.cuh",
         "          __syncthreads();\n          if (most", "          if (most", "several_tiles", CUDA_FEATURES),
    cuda("channel-beyond", "channels beyond C are read", "features.cuh",
         "const bool inside = pixel < pixels_ && c < channels;", "const bool inside = pixel < pixels_;",
         "other_shapes", CUDA_FEATURES),
    cuda("run-beyond", "a run of 16 bytes is copied that ends beyond the features", "features.cuh",
         "if (inside >= kRun) {", "if (inside > 0) {", "runs_that_end", CUDA_FEATURES),
    cuda("unaligned-runs", "runs are copied that do not begin at a multiple of 16 bytes", "features.h",
         "return size <= 1 || stride % run == 0;", "return true;", "values", CUDA_FEATURES),
    cuda("unfilled-ends", "what a slice has beyond the channels is what was there before", "features.cuh",
         "          to.set(at, T(0));\n", "", "values", CUDA_FEATURES),
    cuda("unwaited-weights", "weights are read before their copies have landed", "projected_losses.cuh",
         "  if (Shape::Resident) stream.wait_for_earlier();\n", "", "values", CUDA_FEATURES),
    cuda("unaligned-weights", "runs of weights are copied that do not begin at a multiple of 16 bytes", "weights.cuh",
         "(m.stride[0] | channels) % 4 == 0", "true", "values", CUDA_FEATURES),
    cuda("class-beyond-weights", "weights of classes beyond K are read", "weights.cuh",
         "if (k >= p.classes || channel >= network", "if (channel >= network", "other_shapes", CUDA_FEATURES),
    cuda("weight-beyond", "and of channels beyond C", "weights.cuh",
         "k >= p.classes || channel >= network.channels", "k >= p.classes", "other_shapes", CUDA_FEATURES),
    cuda("slice-beyond", "packed weights are asked for that come after the last", "weights.cuh",
         "next_ = next < slices_ ? place", "next_ = true ? place", "other_shapes", CUDA_FEATURES),
    cuda("weights-of-another-step", "or those of a step that is not the next", "weights.cuh",
         "place(next, kSteps == 1 ? !s : s)", "place(next, s)", "other_shapes", CUDA_FEATURES),
    cuda("lost-small-features", "the projection loses what a tensor core's 11 bits do not hold", "features.cuh",
         "multiply_tf32(c, l.small, r.big);", "", "values", CUDA_FEATURES),
    cuda("pixel-beyond", "gradients of pixels beyond the image are written", "projected_losses.cuh",
         "if (pixel < tile.count) write", "write", "values", CUDA_FEATURES),
    cuda("sum-beyond", "sums of channels beyond C are written", "features.cuh",
         "if (c < classes && channel < network.channels) {", "if (c < classes) {", "values", CUDA_FEATURES),
    cuda("back-beyond", "features' gradients beyond the image are written", "projection_back.cuh",
         "if (8 * n + at.sum_column(i) >= count) continue;", "", "values", CUDA_FEATURES),
    cuda("back-channel-beyond", "project_back reads weights beyond C", "projection_back.cuh",
         "channel + at.row(i) < a.channels ? channel + at.row(i) : a.channels - 1;", "channel + at.row(i);", "values",
         CUDA_FEATURES),
    cuda("nan-features-of-ignored", "features of ignored pixels reach the weights' gradient", "features.cuh",
         "& 1 ? x[4 * s + i] : 0.f;", "& 1 ? x[4 * s + i] : x[4 * s + i];", "ignored", CUDA_FEATURES),
    cuda("lost-small-part", "products lose what a tensor core's 11 bits do not hold", "products.cuh",
         "  if (!exact_a) multiply_tf32(step, a.small, b.big);\n", "", "values", CUDA_FEATURES),
    cuda("lost-slot", "a part of the weights' gradient is left out", "projected_losses_weights.cuh",
         "slot < count; ++slot", "slot < count - (count > 1); ++slot", "several_tiles", CUDA_FEATURES),
    cuda("lost-bias", "logits lack the bias", "projected_losses.cuh",
         "if (c < p.classes && network.bias.data) z +=", "if (false) z +=", "values", CUDA_FEATURES),
    cuda("unscaled-features-gradient", "the features' gradient lacks the incoming one", "projection_back.cuh",
         "sums[n].x[i] * factor", "sums[n].x[i]", "values", CUDA_FEATURES),
    cuda("unaligned-pairs", "two gradients are written at once to an odd place", "projection_back.cuh",
         "a.pixel_stride == 1 && a.pixels % 2 == 0", "a.pixel_stride == 1", "values", CUDA_FEATURES),
    cuda("second-of-two-beyond", "of two the second is written beyond the image", "projection_back.cuh",
         "if (8 * n + at.sum_column(i + 1) < count) write_float", "write_float", "values", CUDA_FEATURES),
    cuda("rows-follow", "rows that do not follow each other are read as if they did", "features.h",
         "out.flat = height == 1 ||", "out.flat = true ||", "layouts", CUDA_FEATURES),
    cuda("nan-to-infinity", "a NaN with low bits alone becomes infinity, one with all bits 0", "products.cuh",
         "x - __builtin_bit_cast(float, big))", "x == x ? x - __builtin_bit_cast(float, big) : 0.f)", "nan_is_one",
         CUDA_FEATURES),
    cuda("narrow-always", "positions that do not fit 32 bits are calculated in them", "call.cuh",
         "return n.rows.narrow() && n.columns.narrow();", "return true;", "beyond_32_bits"),
    cuda("narrow-rows", "or rows' alone", "call.cuh",
         "return n.rows.narrow() && n.columns.narrow();", "return n.columns.narrow();", "beyond_32_bits"),
    cuda("narrow-columns", "or columns'", "call.cuh",
         "return n.rows.narrow() && n.columns.narrow();", "return n.rows.narrow();", "beyond_32_bits"),
    cuda("undivided-in-place", "a gradient that is in place lacks the number of valid pixels", "call.cuh",
         "gradients |= n->in_place();", "gradients |= false;", "shapes and feature"),
    cuda("uncounted-divisor", "the number of valid pixels is not counted beforehand", "call.cuh",
         "!(gradients && (counts(0) || counts(1)))", "true", "values", CUDA_FEATURES),
    # The projection on its own, and the losses on raw logits.
    cuda("no-barrier-after-logit-parts", "parts of logits are added up before all warps' are there", "projection.cuh",
         "    parts.put(sums, first);\n    __syncthreads();\n", "    parts.put(sums, first);\n", "other_shapes",
         CUDA_PROJECTION),
    cuda("no-barrier-after-adding", "and written before they are added up", "projection.cuh",
         "    parts.add_up(p.groups);\n    __syncthreads();\n", "    parts.add_up(p.groups);\n", "other_shapes",
         CUDA_PROJECTION),
    cuda("no-barrier-between-class-rounds", "parts are overwritten that others still write out", "projection.cuh",
         "    if (first > 0) __syncthreads();\n", "", "other_shapes", CUDA_PROJECTION),
    cuda("lost-warp", "a warp's share of a tile's channels is left out", "projection.cuh",
         "other < kWarps * kElements; other +=", "other < (kWarps - 1) * kElements; other +=", "share_channels",
         CUDA_PROJECTION),
    cuda("zero-pilot", "the pilot is 0", "projection.cuh",
         "0.5f * below + 0.5f * above", "0.f", "far_from_zero", CUDA_PROJECTION),
    cuda("unmoved-means", "tiles' sums of squares are added up as they are", "projection.cuh",
         "number(tile) * off * off", "0 * off", "values_gradients", CUDA_PROJECTION),
    cuda("tile-beyond", "logits of pixels beyond the image are written", "projection.cuh",
         "const bool inside = pixel < at.count && k < p.classes;", "const bool inside = k < p.classes;",
         "values_gradients", CUDA_PROJECTION),
    cuda("unrounded-features", "autocast rounds the weights alone", "projection.cuh",
         "if (to == DType::kFloat) return;", "return;", "autocast", CUDA_PROJECTION),
    cuda("infinity-by-small-parts", "infinite features are multiplied by parts of weights of either sign",
         "products.cuh", "{ return a.finite; }", "{ return a.big; }", "infinite", CUDA_PROJECTION),
    cuda("wait-for-one-slice", "the second of two slices is read before its copy has landed", "projection_weights.cuh",
         "stream.wait(both);", "stream.wait(0);", "other_shapes", CUDA_PROJECTION),
    cuda("two-slices-always", "a second slice is read that is another tile's", "projection_weights.cuh",
         "r > 0 && both, x", "r > 0, x", "other_shapes", CUDA_PROJECTION),
    cuda("no-barrier-after-logit-gradient", "gradients of raw logits are read before all are there",
         "projection_weights.cuh", "classes, p.grid.pixels);\n      __syncthreads();\n", "classes, p.grid.pixels);\n",
         "other_shapes", CUDA_PROJECTION),
    cuda("no-barrier-after-coefficients", "or the coefficients they are formed with", "projection_weights.cuh",
         "  reader.open(first_class, classes);\n  __syncthreads();\n", "  reader.open(first_class, classes);\n",
         "other_shapes", CUDA_PROJECTION),
    cuda("one-gradient", "a tile's gradient is overwritten that others still read", "projection_weights.cuh",
         ", side = !side", "", "other_shapes", CUDA_PROJECTION),
    cuda("nan-features", "features that no gradient reaches count in the weights' gradient", "projection_weights.cuh",
         "any[j] = any[j] || !(g[j] == 0.f);", "any[j] = true;", "no_gradient_reaches", CUDA_PROJECTION),
    cuda("stale-chunk", "a chunk of classes has the first one's coefficients", "projection_back.cuh",
         "            reader.open(from, classes);\n", "", "other_shapes", CUDA_PROJECTION),
    cuda("wrong-coefficient", "the gradient of the squares is half of itself", "logit_gradient.cuh",
         "static_cast<float>(2 * read(", "static_cast<float>(read(", "values_gradients", CUDA_PROJECTION),
    cuda("lost-piece", "a piece of scale's and shift's gradients is left out", "reduction.cuh",
         "piece < pieces; piece", "piece < pieces - 1; piece", "normalized", CUDA_PROJECTION),
    # Launches.
    cuda("limit-of-a-call", "a kernel may have the shared memory that this call needs", "launch.cuh",
         "lift_shared_limit(name, kernel, runtime);",
         "set_shared_limit(name, kernel, runtime.device, size.shared_bytes);", "allowed", CUDA_LIMITS),
    cuda("limit-of-one-card", "it is asked for on the first device alone", "launch.cuh",
         "if (lifted.count({kernel, runtime.device})) return;",
         "for (const auto& [known, device] : lifted) if (known == kernel) return;", "allowed", CUDA_LIMITS),
)  # fmt: skip

# Mutants that change no result: (what is removed, why nothing can notice).
EQUIVALENT = (
    ("the zero staged below a row of a network with the loss grid's rows", "its weight is 0"),
    ("the vote that skips a row of ignored pixels (`__any_sync`)", "it saves time; masks do the rest"),
    ("`__ldg` in `read`", "it chooses a cache"),
    ("the shift of tiles (`AxisTiles::shift`)", "it saves traffic: `test_global_traffic` bounds that"),
    ("the order in which logits are staged (`by_class`)", "it makes accesses coalesce"),
    (
        "odd pitches of shared memory (`ClassOrder`), those of features.h, `swizzle`",
        "they keep lanes on different banks",
    ),
    ("the zero for pixels beyond the image in a slice (`pixel < pixels_`)", "nothing counts there: masks do the rest"),
    ("the products that `exact_a` and `exact_b` leave out", "they add 0"),
)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on the mutated copy, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for part in ("hetero_kernels", "tests", "csrc", "benchmarks"):  # tests import benchmarks
            shutil.copytree(ROOT / part, copy / part, ignore=ignore)
        path = mutation.path(copy)
        text = path.read_text()
        if mutation.old not in text:
            raise ValueError(f"mutation {mutation.name!r}: {mutation.file} has no text {mutation.old!r}")
        path.write_text(text.replace(mutation.old, mutation.new))
        pytest = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, **mutation.suite.environment, "PYTHONPATH": folder}
        environment["HETERO_KERNELS_EMULATION_DIR"] = str(copy / "build")
        if mutation.suite is CUDA:  # what the mutation does not reach is compiled once for all
            from emulation import build

            environment["HETERO_KERNELS_EMULATION_OBJECTS"] = str(build.compiled().parent)
        command = [*pytest, mutation.within or mutation.suite.tests, "-k", mutation.tests]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"mutation {mutation.name!r}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    if "the emulation does not compile" in done.stdout:
        raise RuntimeError(f"mutation {mutation.name!r} does not compile\n{done.stdout[-2000:]}")
    failed = re.search(r"^FAILED \S+::(\S.*?)(?: - .*)?$", done.stdout, re.M)
    return failed[1] if failed else None


def table(mutations: tuple[Mutation, ...]) -> str:
    rows = ["| mutation | what is wrong | file | noticed by |", "|---|---|---|---|"]
    for mutation in mutations:
        found = caught_by(mutation)
        rows.append(
            f"| {mutation.name} | {mutation.what} | {mutation.file} | {f'`{found}`' if found else '**nothing**'} |"
        )
        print(rows[-1], flush=True)
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutations; all where none is named")
    parser.add_argument("--write", action="store_true", help="write the table into tests/README.md")
    options = parser.parse_args()
    unknown = set(options.names) - {m.name for m in (*MUTATIONS, *CUDA_MUTATIONS)}
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    missed = False
    for suite, mutations in ((TRITON, MUTATIONS), (CUDA, CUDA_MUTATIONS)):
        chosen = tuple(m for m in mutations if not options.names or m.name in options.names)
        if not chosen:
            continue
        text = table(chosen)
        missed = missed or "**nothing**" in text
        if options.write:
            readme = ROOT / "tests" / "README.md"
            before, rest = readme.read_text().split(suite.begin)
            readme.write_text(f"{before}{suite.begin}\n{text}\n{suite.end}{rest.split(suite.end)[1]}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
