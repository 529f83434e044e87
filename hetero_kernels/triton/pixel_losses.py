"""Kernels of the pixel losses: loss and gradient in one launch. reduction.py has the small one after it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .hakd_math import OFF, hakd_row, hakd_row_bounded
from .launch import (
    LossGrid,
    NetworkPlan,
    Normalization,
    Output,
    bounded_limit,
    count_early,
    device_guard,
    differ,
    finish,
    label_argument,
    plan_term,
    power_of,
    precision,
    upstream_argument,
)
from .many_classes import hakd_many_kernel, segmentation_many_kernel
from .pixel_math import LOG2E, add_scaled, total
from .reduction import store_maps, store_sums, term_scale
from .segmentation_math import cross_entropy_row, distillation_row
from .spatial import spatial_scores
from .tile import (
    class_numbers,
    columns_of,
    fraction,
    load_band,
    load_labels,
    load_per_class,
    locate,
    logits_of,
    lower,
    masked,
    pixel_factor,
    store_row,
    store_slot,
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
    s_row = lower(first_row, student.height, grid.height, ALIGN)
    t_row = lower(first_row, teacher.height, grid.height, ALIGN)
    for y in range(pixels.begin, pixels.end):
        label, valid, wrong = load_labels(labels, pixels, y, classes, SAMPLED)
        s_f = fraction(y, s_row, student.height, grid.height, ALIGN)
        t_f = fraction(y, t_row, teacher.height, grid.height, ALIGN)
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
    hakd_scale = term_scale(hakd_term, HAKD_PARTS)
    proj_scale = term_scale(proj_term, PROJ_PARTS)
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
    program = tl.program_id(0)
    pixels = locate(program, grid, TILE, ROWS, ALIGN, SAME)
    c = class_numbers(BLOCKS)
    first_row = tl.minimum(pixels.begin, grid.height - 1)
    s_row = lower(first_row, student.height, grid.height, ALIGN)
    t_row = lower(first_row, teacher.height, grid.height, ALIGN)
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
    task_scale = term_scale(task_term, TASK_PARTS)
    kd_scale = term_scale(kd_term, KD_PARTS)

    task_sum, kd_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    valid_sum = tl.zeros([TILE], tl.int32)
    below = zeros(c, pixels, STUDENT and not STUDENT_DIRECT)
    above = below
    for y in range(pixels.begin, pixels.end):
        label, valid, wrong = load_labels(labels, pixels, y, classes, False)
        s_f = fraction(y, s_row, student.height, grid.height, ALIGN)
        o_s = logits_of(s_band, s_f, STUDENT_DIRECT)
        task, task_g = cross_entropy_row(o_s, c, classes, label, weight, weight_sum, smoothing, HAS_WEIGHT, SMOOTH)
        factor = pixel_factor(upstream, pixels, y, UPSTREAM)
        g = add_scaled(zeros(c, pixels), task_g, (factor * task_scale)[None, :])
        kd = tl.zeros([TILE], tl.float32)
        if HAS_TEACHER:
            t_f = fraction(y, t_row, teacher.height, grid.height, ALIGN)
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


@tuned(tilings_of)
def hakd_loss(tiling: Tiling, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Implementation of the operator ``hakd_loss``, see ops/pixel_losses.py."""
    return _hakd(tiling, (student, None), (teacher, None), *rest)[:5]


@tuned(tilings_of)
def normalized_hakd_loss(
    tiling: Tiling, student: Tensor, student_scale: Tensor, student_shift: Tensor, teacher: Tensor,
    teacher_scale: Tensor, teacher_shift: Tensor, labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None,
    proj_normalizer: Tensor | None, upstream: Tensor | None, student_relu: bool, teacher_relu: bool, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of the operator ``normalized_hakd_loss``, see ops/pixel_losses.py."""
    return _hakd(
        tiling, (student, Normalization(student_scale, student_shift, student_relu)),
        (teacher, Normalization(teacher_scale, teacher_shift, teacher_relu)), labels, scalars, hakd_normalizer,
        proj_normalizer, upstream, *options,
    )  # fmt: skip


def _hakd(
    tiling: Tiling, student_given: tuple[Tensor, Normalization | None],
    teacher_given: tuple[Tensor, Normalization | None], labels: Tensor, scalars: Tensor,
    hakd_normalizer: Tensor | None, proj_normalizer: Tensor | None, upstream: Tensor | None, kmm: bool, kem: str,
    divergence: str, resolution: str, align_corners: bool, ignore_index: int, reduction: str, student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, terms, gradients of both networks' logits, and of their scale and shift [2, K]."""
    (student_logits, _), (teacher_logits, _) = student_given, teacher_given
    temperature, hakd_weight, proj_weight = scalars.tolist()
    batch, classes = student_logits.shape[:2]
    size = (labels.shape[1], labels.shape[2])
    if resolution == "feature":
        size = (student_logits.shape[2], student_logits.shape[3])
    grid = LossGrid(batch, tiling, size, (student_logits.shape[2], teacher_logits.shape[2]), align_corners)
    output = Output(grid, reduction, student_logits.device)
    student = NetworkPlan(student_logits, grid, student_grad, student_given[1])
    teacher = NetworkPlan(teacher_logits, grid, teacher_grad and proj_weight != 0, teacher_given[1])
    results = [(n.gradient, n.sums) for n in (student, teacher)]
    if teacher_grad and proj_weight == 0:  # L_proj is its only source
        sums = (2, classes) if teacher_given[1] else (0,)
        results[1] = (output.partial.new_zeros(teacher_logits.shape), output.partial.new_zeros(sums))
    gradients = tuple(pair[i] for i in range(2) for pair in results)
    if grid.programs == 0:
        return (*output.empty(), *(g.zero_() for g in gradients))

    share = 1.0 / (max(batch, 1) * classes) if kem == "spatial" else None
    terms = (
        plan_term(hakd_weight, reduction, hakd_normalizer, output.partial, share),
        plan_term(proj_weight, reduction, proj_normalizer, output.partial),
    )
    where, sampled = label_argument(labels, size, classes, ignore_index)
    common = {
        "STUDENT_DIRECT": student.direct, "TEACHER_DIRECT": teacher.direct, "KMM": kmm, "SAMPLED": sampled,
        **grid.blocks(),
    }  # fmt: skip
    kernel, numbers, powers = hakd_many_kernel, (temperature,), {}
    if not tiling.looped:
        kernel, numbers = hakd_kernel, (temperature, bounded_limit(temperature))
        powers = {"POWER": power_of(temperature)}
    with device_guard(student_logits):
        if (student_grad or teacher_grad) and differ(terms):
            count_early(terms, grid, where, sampled, classes)
        spatial_sums = output.partial
        if kem == "spatial":
            spatial_sums = spatial_scores(student, teacher, where, grid, classes, common)
        kernel[(grid.programs,)](
            student.argument(), teacher.argument(), where, upstream_argument(upstream, output.partial),
            grid.argument(), terms[0].argument(), terms[1].argument(), spatial_sums, output.argument(), classes,
            *numbers, STUDENT=student.wanted, TEACHER=teacher.wanted,
            STUDENT_SPAN=student.span_block, TEACHER_SPAN=teacher.span_block,
            PRECISION=precision(student_logits), KEM=kem, CE=divergence == "ce",
            PROJ=proj_weight != 0, UPSTREAM=upstream is not None, MAPS=output.maps, HAKD_PARTS=terms[0].block,
            PROJ_PARTS=terms[1].block, **powers, **common,
        )  # fmt: skip
        finish(student, teacher, grid, terms, output, classes)
    return (*output.values(terms), *gradients)


@tuned(tilings_of)
def segmentation_loss(
    tiling: Tiling, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, class_weight: Tensor | None,
    scalars: Tensor, task_normalizer: Tensor | None, kd_normalizer: Tensor | None, upstream: Tensor | None,
    align_corners: bool, ignore_index: int, reduction: str, grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of the operator ``segmentation_loss``, see ops/pixel_losses.py."""
    temperature, task_weight, kd_weight, smoothing = scalars.tolist()
    other = logits if teacher_logits is None else teacher_logits
    class_weight = None if class_weight is None else class_weight.contiguous()
    batch, classes = logits.shape[:2]
    size = (labels.shape[1], labels.shape[2])
    grid = LossGrid(batch, tiling, size, (logits.shape[2], other.shape[2]), align_corners)
    output = Output(grid, reduction, logits.device)
    student, teacher = NetworkPlan(logits, grid, grad), NetworkPlan(other, grid, False)
    if grid.programs == 0:
        return (*output.empty(), student.gradient.zero_())
    terms = (
        plan_term(task_weight, reduction, task_normalizer, output.partial),
        plan_term(kd_weight if teacher_logits is not None else 0.0, reduction, kd_normalizer, output.partial),
    )
    where, _ = label_argument(labels, size, classes, ignore_index)
    with device_guard(logits):
        if (grad and differ(terms)) or (class_weight is not None and terms[0].mode == "count"):
            count_early(terms, grid, where, False, classes, class_weight)
        kernel = segmentation_many_kernel if tiling.looped else segmentation_kernel
        kernel[(grid.programs,)](
            student.argument(), teacher.argument(), where, upstream_argument(upstream, output.partial),
            grid.argument(), terms[0].argument(), terms[1].argument(),
            output.partial if class_weight is None else class_weight,
            output.argument(), classes, temperature, smoothing,
            STUDENT=grad, STUDENT_DIRECT=student.direct,
            TEACHER_DIRECT=teacher.direct, STUDENT_SPAN=student.span_block, PRECISION=precision(logits),
            HAS_TEACHER=teacher_logits is not None, HAS_WEIGHT=class_weight is not None,
            SMOOTH=smoothing != 0, UPSTREAM=upstream is not None, MAPS=output.maps, TASK_PARTS=terms[0].block,
            KD_PARTS=terms[1].block, **grid.blocks(),
        )  # fmt: skip
        finish(student, teacher, grid, terms, output, classes)
    return (*output.values(terms), student.gradient)
