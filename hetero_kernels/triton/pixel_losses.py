"""Kernels of the pixel losses: loss and gradient in one launch. reduction.py has the small one after it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hakd_math import OFF, hakd_row, hakd_row_bounded
from .launch import (
    Launch,
    Normalization,
    Shape,
    aligned,
    bounded_limit,
    device_guard,
    power_of,
    precision,
    shape_of,
)
from .many_classes import hakd_many_kernel, segmentation_many_kernel
from .pixel_math import LOG2E, add_scaled, total
from .plan import PixelPlan, check_labels, upstream_argument
from .reduction import store_maps, store_slot, store_sums, term_scale
from .segmentation_math import cross_entropy_row, distillation_row
from .spatial import SpatialScores
from .tile import (
    class_numbers,
    columns_of,
    fraction,
    grid_of,
    labels_of,
    load_band,
    load_labels,
    load_per_class,
    locate,
    logits_of,
    lower,
    masked,
    pixel_factor,
    shown,
    store_row,
    zeros,
)
from .tuning import Tiling, tilings_of, tuned


@triton.jit
def scaled_band(band, unit):
    """A band in units of T ln 2; what lies beyond K stays within float's range."""
    below, above = (), ()
    for i in tl.static_range(len(band[0])):
        below = below + (tl.maximum(band[0][i] * unit, OFF, propagate_nan=tl.PropagateNan.ALL),)
        above = above + (tl.maximum(band[1][i] * unit, OFF, propagate_nan=tl.PropagateNan.ALL),)
    return below, above


@triton.jit
def take_gradient(network, c, classes, pixels, y, grid, f, g, below, above, DIRECT: tl.constexpr):
    """Stores a row's gradient, or adds it to the band's two coarse rows."""
    if DIRECT:
        store_row(network, c, classes, pixels, y, grid, g)
        return below, above
    else:
        return add_scaled(below, g, 1.0 - f), add_scaled(above, g, f)


@triton.jit
def bounded_band(band, c, classes, limit):
    """Whether every logit of a band is within the limit; a NaN is no obstacle."""
    most = tl.zeros([band[0][0].shape[1]], tl.float32)
    for i in tl.static_range(len(c)):
        z = tl.maximum(tl.abs(band[0][i]), tl.abs(band[1][i]))
        most = tl.maximum(most, tl.max(tl.where(c[i] < classes, z, 0.0), 0))
    return tl.max(most, 0) <= limit


@triton.jit
def hakd_rows(
    student, teacher, labels, upstream, grid, output, c, classes, pixels, s_band, t_band, spatial,
    temperature, hakd_scale, proj_scale, BOUNDED: tl.constexpr, POWER: tl.constexpr, ALIGN: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr,
    KMM: tl.constexpr, KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr, SAMPLED: tl.constexpr,
    UPSTREAM: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """A program's rows: sums of both terms and of valid pixels [pixels], and the gradients of the bands' coarse rows.

    BOUNDED: by the bounded mathematics, from bands in units of T ln 2; else by the guarded.
    """
    nothing = tl.zeros(pixels.x.shape, tl.float32)
    hakd_sum, proj_sum, valid_sum = nothing, nothing, tl.zeros(pixels.x.shape, tl.int32)
    s_below, t_below = (
        zeros(c, pixels, STUDENT and not STUDENT_DIRECT),
        zeros(c, pixels, TEACHER and not TEACHER_DIRECT),
    )
    s_above, t_above = s_below, t_below
    first_row = tl.minimum(pixels.begin, grid.height - 1)
    s_height, t_height = shown(student.height), shown(teacher.height)
    s_row = lower(first_row, s_height, grid.height, ALIGN)
    t_row = lower(first_row, t_height, grid.height, ALIGN)
    for y in range(pixels.begin, pixels.end):
        label, valid, wrong = load_labels(labels, pixels, y, classes, SAMPLED)
        s_f = fraction(y, s_row, s_height, grid.height, ALIGN)
        t_f = fraction(y, t_row, t_height, grid.height, ALIGN)
        factor = pixel_factor(upstream, pixels, y, UPSTREAM)
        z_s = logits_of(s_band, s_f, STUDENT_DIRECT, BOUNDED)
        z_t = logits_of(t_band, t_f, TEACHER_DIRECT, BOUNDED)
        if BOUNDED:
            hakd, proj, g_s, g_t = hakd_row_bounded(
                z_s, z_t, c, classes, label, temperature, factor * hakd_scale, factor * proj_scale,
                POWER, KMM, KEM, CE, PROJ,
            )  # fmt: skip
        else:
            hakd, proj, g_s, g_t = hakd_row(
                z_s, z_t, c, classes, label, spatial, temperature, factor * hakd_scale, factor * proj_scale,
                KMM, KEM, CE, PROJ,
            )  # fmt: skip
        ignored = tl.where(wrong, float("nan"), 0.0)
        hakd, proj = tl.where(valid, hakd, ignored), tl.where(valid, proj, ignored)
        hakd_sum += hakd
        proj_sum += proj
        valid_sum += valid.to(tl.int32)
        store_maps(output, pixels, y, grid, hakd, proj, MAPS)
        if STUDENT:
            s_below, s_above = take_gradient(
                student, c, classes, pixels, y, grid, s_f, masked(g_s, valid), s_below, s_above, STUDENT_DIRECT
            )
        if TEACHER:
            t_below, t_above = take_gradient(
                teacher, c, classes, pixels, y, grid, t_f, masked(g_t, valid), t_below, t_above, TEACHER_DIRECT
            )
    return hakd_sum, proj_sum, valid_sum, (s_below, s_above), (t_below, t_above)


@triton.jit
def hakd_kernel(
    student, teacher, labels, upstream, grid, hakd_term, proj_term, spatial_sums, output, classes, temperature, limit,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr,
    STUDENT_SPAN: tl.constexpr, TEACHER_SPAN: tl.constexpr, PRECISION: tl.constexpr, POWER: tl.constexpr,
    KMM: tl.constexpr, KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr, SAMPLED: tl.constexpr,
    UPSTREAM: tl.constexpr, MAPS: tl.constexpr, HAKD_PARTS: tl.constexpr, PROJ_PARTS: tl.constexpr,
):  # fmt: skip
    """Sections 1 to 6. STUDENT, TEACHER: whose gradient is wanted; PROJ: whether L_proj has one; POWER: T if 1, 2 or 4.

    ``spatial_sums`` [B, 2, K] is what kem="spatial" measures scores by, see ``scores_kernel``.
    """
    labels, grid = labels_of(labels), grid_of(grid)
    program = tl.program_id(0)
    pixels = locate(program, grid, TILE, ROWS, ALIGN, SAME)
    c = class_numbers(BLOCKS)
    s_columns, t_columns = columns_of(pixels, student, grid, ALIGN), columns_of(pixels, teacher, grid, ALIGN)
    s_band = load_band(student, c, classes, pixels, s_columns, grid, ALIGN, STUDENT_DIRECT)
    t_band = load_band(teacher, c, classes, pixels, t_columns, grid, ALIGN, TEACHER_DIRECT)
    spatial = (c, c)
    if KEM == "spatial":
        sums = spatial_sums + pixels.image * 2 * classes
        spatial = (load_per_class(sums, c, classes), load_per_class(sums + classes, c, classes))
    hakd_scale = term_scale(hakd_term, 0, HAKD_PARTS)
    proj_scale = term_scale(proj_term, 1, PROJ_PARTS)
    proj_scale /= classes

    if KEM == "spatial":
        bounded = False
    else:
        bounded = bounded_band(s_band, c, classes, limit) & bounded_band(t_band, c, classes, limit)
    if bounded:
        unit = LOG2E / temperature
        hakd_sum, proj_sum, valid_sum, s_gradient, t_gradient = hakd_rows(
            student, teacher, labels, upstream, grid, output, c, classes, pixels, scaled_band(s_band, unit),
            scaled_band(t_band, unit), spatial, temperature, hakd_scale, proj_scale, True, POWER,
            ALIGN, STUDENT, TEACHER, STUDENT_DIRECT, TEACHER_DIRECT, KMM, KEM, CE, PROJ, SAMPLED, UPSTREAM, MAPS,
        )  # fmt: skip
    else:
        hakd_sum, proj_sum, valid_sum, s_gradient, t_gradient = hakd_rows(
            student, teacher, labels, upstream, grid, output, c, classes, pixels, s_band, t_band,
            spatial, temperature, hakd_scale, proj_scale, False, POWER,
            ALIGN, STUDENT, TEACHER, STUDENT_DIRECT, TEACHER_DIRECT, KMM, KEM, CE, PROJ, SAMPLED, UPSTREAM, MAPS,
        )  # fmt: skip
    store_sums(output, program, hakd_sum, proj_sum, valid_sum)
    if STUDENT and not STUDENT_DIRECT:
        store_slot(student, c, classes, s_columns, program, s_gradient, STUDENT_SPAN, PRECISION)
    if TEACHER and not TEACHER_DIRECT:
        store_slot(teacher, c, classes, t_columns, program, t_gradient, TEACHER_SPAN, PRECISION)


@triton.jit
def segmentation_kernel(
    student, teacher, labels, upstream, grid, task_term, kd_term, class_weight, output, classes, temperature,
    smoothing,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr,
    STUDENT: tl.constexpr, STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr, STUDENT_SPAN: tl.constexpr,
    PRECISION: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    UPSTREAM: tl.constexpr, MAPS: tl.constexpr, TASK_PARTS: tl.constexpr, KD_PARTS: tl.constexpr,
):  # fmt: skip
    """Section 7. STUDENT: whether the gradient is wanted; SMOOTH: whether there is label smoothing."""
    labels, grid = labels_of(labels), grid_of(grid)
    program = tl.program_id(0)
    pixels = locate(program, grid, TILE, ROWS, ALIGN, SAME)
    c = class_numbers(BLOCKS)
    first_row = tl.minimum(pixels.begin, grid.height - 1)
    s_height, t_height = shown(student.height), shown(teacher.height)
    s_row = lower(first_row, s_height, grid.height, ALIGN)
    t_row = lower(first_row, t_height, grid.height, ALIGN)
    s_columns = columns_of(pixels, student, grid, ALIGN)
    s_band = load_band(student, c, classes, pixels, s_columns, grid, ALIGN, STUDENT_DIRECT)
    t_band = s_band
    if HAS_TEACHER:
        t_columns = columns_of(pixels, teacher, grid, ALIGN)
        t_band = load_band(teacher, c, classes, pixels, t_columns, grid, ALIGN, TEACHER_DIRECT)
    if HAS_WEIGHT:
        weight = load_per_class(class_weight, c, classes)
        weight_sum = tl.sum(total(weight), 0)
    else:
        weight = ()
        for i in tl.static_range(len(c)):
            weight = weight + (tl.where(c[i] < classes, 1.0, 0.0),)
        weight_sum = tl.cast(classes, tl.float32)
    task_scale = term_scale(task_term, 0, TASK_PARTS)
    kd_scale = term_scale(kd_term, 1, KD_PARTS)

    task_sum, kd_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    valid_sum = tl.zeros([TILE], tl.int32)
    below = zeros(c, pixels, STUDENT and not STUDENT_DIRECT)
    above = below
    for y in range(pixels.begin, pixels.end):
        label, valid, wrong = load_labels(labels, pixels, y, classes, False)
        s_f = fraction(y, s_row, s_height, grid.height, ALIGN)
        o_s = logits_of(s_band, s_f, STUDENT_DIRECT)
        task, task_g = cross_entropy_row(o_s, c, classes, label, weight, weight_sum, smoothing, HAS_WEIGHT, SMOOTH)
        factor = pixel_factor(upstream, pixels, y, UPSTREAM)
        g = add_scaled(zeros(c, pixels), task_g, (factor * task_scale)[None, :])
        kd = tl.zeros([TILE], tl.float32)
        if HAS_TEACHER:
            t_f = fraction(y, t_row, t_height, grid.height, ALIGN)
            o_t = logits_of(t_band, t_f, TEACHER_DIRECT)
            kd, kd_g = distillation_row(o_s, o_t, c, temperature)
            g = add_scaled(g, kd_g, (factor * kd_scale)[None, :])
        nothing = tl.where(wrong, float("nan"), 0.0)
        task, kd = tl.where(valid, task, nothing), tl.where(valid, kd, nothing)
        task_sum += task
        kd_sum += kd
        valid_sum += valid.to(tl.int32)
        store_maps(output, pixels, y, grid, task, kd, MAPS)
        if STUDENT:
            below, above = take_gradient(
                student, c, classes, pixels, y, grid, s_f, masked(g, valid), below, above, STUDENT_DIRECT
            )
    store_sums(output, program, task_sum, kd_sum, valid_sum)
    if STUDENT and not STUDENT_DIRECT:
        store_slot(student, c, classes, s_columns, program, (below, above), STUDENT_SPAN, PRECISION)


# The losses --------------------------------------------------------------------------------------------------------


Kind = tuple[torch.dtype, torch.dtype, bool]  # of a normalization: of scale and shift, and whether ReLU follows


class HakdCall(NamedTuple):
    """What a plan of HeteroAKD is made from; of temperature and weights only what selects code."""

    tiling: Tiling
    device: torch.device
    student: Shape
    teacher: Shape
    labels: Shape
    normalizers: tuple[torch.dtype | None, torch.dtype | None]
    upstream: Shape | None
    normalizations: tuple[Kind | None, Kind | None]
    kmm: bool
    kem: str
    divergence: str
    resolution: str
    align_corners: bool
    ignore_index: int
    reduction: str
    wanted: tuple[bool, bool]
    weights: tuple[bool, bool]
    power: int


class HakdPlan(PixelPlan):
    def __init__(self, call: HakdCall) -> None:
        self.size = (call.student[0] if call.resolution == "feature" else call.labels[0])[-2:]
        wanted = (call.wanted[0], call.wanted[1] and call.weights[1])
        batch, classes = call.student[0][:2]
        super().__init__(
            call.tiling, call.student, call.teacher, call.labels, self.size, call.align_corners, wanted,
            tuple(kind is not None for kind in call.normalizations), call.reduction, weights=call.weights,
            given=tuple(dtype is not None for dtype in call.normalizers),
            share=1.0 / (max(batch, 1) * classes) if call.kem == "spatial" else None,
        )  # fmt: skip
        common = {
            "STUDENT_DIRECT": self.student.direct, "TEACHER_DIRECT": self.teacher.direct, "KMM": call.kmm,
            "SAMPLED": self.terms.sampled, **self.grid.blocks(),
        }  # fmt: skip
        self.spatial = SpatialScores(self.grid, batch, classes, common) if call.kem == "spatial" else None
        self.looped = call.tiling.looped
        kernel, powers = (hakd_many_kernel, {}) if self.looped else (hakd_kernel, {"POWER": call.power})
        self.main = Launch(
            kernel, (self.grid.programs,), STUDENT=wanted[0], TEACHER=wanted[1], STUDENT_SPAN=self.student.span_block,
            TEACHER_SPAN=self.teacher.span_block, PRECISION=precision(call.device), KEM=call.kem,
            CE=call.divergence == "ce", PROJ=call.weights[1], UPSTREAM=call.upstream is not None, MAPS=self.maps,
            HAKD_PARTS=self.terms.blocks[0], PROJ_PARTS=self.terms.blocks[1], **powers, **common,
        )  # fmt: skip


hakd_plan = functools.lru_cache(maxsize=128)(HakdPlan)


@tuned(tilings_of)
def hakd_loss(tiling: Tiling, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Implementation of the operator ``hakd_loss``, see ops/pixel_losses.py."""
    return _hakd(tiling, (student, teacher), (None, None), *rest)


@tuned(tilings_of)
def normalized_hakd_loss(
    tiling: Tiling, student: Tensor, student_scale: Tensor, student_shift: Tensor, teacher: Tensor,
    teacher_scale: Tensor, teacher_shift: Tensor, labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None,
    proj_normalizer: Tensor | None, upstream: Tensor | None, student_relu: bool, teacher_relu: bool, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of the operator ``normalized_hakd_loss``, see ops/pixel_losses.py."""
    normalizations = (
        Normalization(student_scale.contiguous(), student_shift.contiguous(), student_relu),
        Normalization(teacher_scale.contiguous(), teacher_shift.contiguous(), teacher_relu),
    )
    return _hakd(
        tiling, (student, teacher), normalizations, labels, scalars, hakd_normalizer, proj_normalizer, upstream,
        *options,
    )  # fmt: skip


def _hakd(
    tiling: Tiling, logits: tuple[Tensor, Tensor], normalizations: tuple[Normalization | None, Normalization | None],
    labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None, proj_normalizer: Tensor | None,
    upstream: Tensor | None, kmm: bool, kem: str, divergence: str, resolution: str, align_corners: bool,
    ignore_index: int, reduction: str, student_grad: bool, teacher_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, terms, gradients of both networks' logits, and of their scale and shift [2, K]."""
    temperature, hakd_weight, proj_weight = scalars.tolist()
    student, teacher = logits
    normalizers = (hakd_normalizer, proj_normalizer)
    plan = hakd_plan(HakdCall(
        tiling, student.device, shape_of(student), shape_of(teacher), shape_of(labels),
        (dtype_of(hakd_normalizer), dtype_of(proj_normalizer)), None if upstream is None else shape_of(upstream),
        (kind_of(normalizations[0]), kind_of(normalizations[1])), kmm, kem, divergence, resolution, align_corners,
        ignore_index, reduction, (student_grad, teacher_grad), (hakd_weight != 0, proj_weight != 0),
        power_of(temperature),
    ))  # fmt: skip
    buffers = plan.allocate(student)
    if plan.grid.programs == 0:
        return _with_zeros(plan.nothing(buffers), teacher, teacher_grad, normalizations[1])
    check_labels(labels, plan.size, plan.classes, ignore_index)
    means = [t for n in normalizations if n is not None for t in n[:2]]
    straight = aligned(student, teacher, labels, upstream, *normalizers, *means)
    networks = plan.arguments(logits, buffers, normalizations)
    where, grid = plan.terms.labels(labels, ignore_index), plan.grid.argument
    terms = plan.terms.arguments((hakd_weight, proj_weight), normalizers, buffers.counts)
    numbers = (temperature,) if plan.looped else (temperature, bounded_limit(temperature))
    with device_guard(student):
        plan.terms.count(straight, where, buffers.counts, plan.classes)
        sums = None if plan.spatial is None else plan.spatial(straight, networks, where, buffers.partial)
        plan.main(
            straight, *networks, where, upstream_argument(upstream), grid, *terms, sums, plan.output(buffers),
            plan.classes, *numbers,
        )  # fmt: skip
        results = plan.finish(straight, networks, terms, buffers)
    return _with_zeros(results, teacher, teacher_grad, normalizations[1])


def _with_zeros(
    results: tuple[Tensor, ...], teacher: Tensor, wanted: bool, normalization: Normalization | None
) -> tuple[Tensor, ...]:
    """``results``, with zeros for what the teacher was to get and no term gives it: L_proj is its only source."""
    if not wanted or results[4].shape == teacher.shape:
        return results
    sums = results[5:] if normalization is None else (results[5], results[0].new_zeros(2, teacher.shape[1]))
    return *results[:4], results[0].new_zeros(teacher.shape), *sums


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def kind_of(normalization: Normalization | None) -> Kind | None:
    if normalization is None:
        return None
    scale, shift, relu = normalization
    return scale.dtype, shift.dtype, relu


class SegmentationCall(NamedTuple):
    """What a plan of ``segmentation_loss`` is made from."""

    tiling: Tiling
    device: torch.device
    student: Shape
    teacher: Shape | None
    labels: Shape
    class_weight: torch.dtype | None
    normalizers: tuple[torch.dtype | None, torch.dtype | None]
    upstream: Shape | None
    align_corners: bool
    ignore_index: int
    reduction: str
    wanted: bool
    weights: tuple[bool, bool]
    smooth: bool


class SegmentationPlan(PixelPlan):
    def __init__(self, call: SegmentationCall) -> None:
        self.size = call.labels[0][-2:]
        super().__init__(
            call.tiling, call.student, call.teacher or call.student, call.labels, self.size, call.align_corners,
            (call.wanted, False), (False, False), call.reduction, weights=call.weights,
            given=tuple(dtype is not None for dtype in call.normalizers), weighted=call.class_weight is not None,
        )  # fmt: skip
        kernel = segmentation_many_kernel if call.tiling.looped else segmentation_kernel
        self.main = Launch(
            kernel, (self.grid.programs,), STUDENT=call.wanted, STUDENT_DIRECT=self.student.direct,
            TEACHER_DIRECT=self.teacher.direct, STUDENT_SPAN=self.student.span_block, PRECISION=precision(call.device),
            HAS_TEACHER=call.teacher is not None, HAS_WEIGHT=call.class_weight is not None, SMOOTH=call.smooth,
            UPSTREAM=call.upstream is not None, MAPS=self.maps, TASK_PARTS=self.terms.blocks[0],
            KD_PARTS=self.terms.blocks[1], **self.grid.blocks(),
        )  # fmt: skip


segmentation_plan = functools.lru_cache(maxsize=128)(SegmentationPlan)


@tuned(tilings_of)
def segmentation_loss(
    tiling: Tiling, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, class_weight: Tensor | None,
    scalars: Tensor, task_normalizer: Tensor | None, kd_normalizer: Tensor | None, upstream: Tensor | None,
    align_corners: bool, ignore_index: int, reduction: str, grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of the operator ``segmentation_loss``, see ops/pixel_losses.py."""
    temperature, task_weight, kd_weight, smoothing = scalars.tolist()
    kd_weight = 0.0 if teacher_logits is None else kd_weight
    other = logits if teacher_logits is None else teacher_logits
    class_weight = None if class_weight is None else class_weight.contiguous()
    normalizers = (task_normalizer, kd_normalizer)
    plan = segmentation_plan(SegmentationCall(
        tiling, logits.device, shape_of(logits), None if teacher_logits is None else shape_of(other),
        shape_of(labels), dtype_of(class_weight), (dtype_of(task_normalizer), dtype_of(kd_normalizer)),
        None if upstream is None else shape_of(upstream), align_corners, ignore_index, reduction, grad,
        (task_weight != 0, kd_weight != 0), smoothing != 0,
    ))  # fmt: skip
    buffers = plan.allocate(logits)
    if plan.grid.programs == 0:
        return plan.nothing(buffers)[:4]
    check_labels(labels, plan.size, plan.classes, ignore_index)
    straight = aligned(logits, other, labels, class_weight, upstream, *normalizers)
    networks = plan.arguments((logits, other), buffers)
    where, grid = plan.terms.labels(labels, ignore_index), plan.grid.argument
    terms = plan.terms.arguments((task_weight, kd_weight), normalizers, buffers.counts)
    with device_guard(logits):
        plan.terms.count(straight, where, buffers.counts, plan.classes, class_weight)
        plan.main(
            straight, *networks, where, upstream_argument(upstream), grid, *terms, class_weight, plan.output(buffers),
            plan.classes, temperature, smoothing,
        )  # fmt: skip
        results = plan.finish(straight, networks, terms, buffers)
    return results[:4]
