"""Operators ``hakd_loss``, ``normalized_hakd_loss`` and ``segmentation_loss``: losses on coarse logits, evaluated on
the loss grid.

Loss and gradient come from one pass, so the forward also returns the gradients (float32 or float64, for an upstream
gradient of one) and the backward only scales them. With ``reduction="none"`` the upstream gradient differs from
pixel to pixel: the backward runs the pass again with ``upstream`` [B, loss grid] as the pixels' factors.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from ..options import HakdOptions, SegmentationOptions
from .library import (
    compute_dtype,
    define_both,
    pack_scalars,
    save_pass,
    saved_pass,
    scale_gradient,
    scale_saved,
)


@functools.cache
def _triton() -> types.ModuleType:
    from ..triton import pixel_losses

    return pixel_losses


def _loss_shape(labels: Tensor, reduction: str, grid: Tensor | None) -> list[int | torch.SymInt]:
    if reduction != "none":
        return []
    return [labels.shape[0], *(labels.shape[1:] if grid is None else grid.shape[2:])]


def _gradient_like(logits: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(logits.shape if wanted else [0], dtype=dtype)


# hakd_loss ----------------------------------------------------------------------------------------------------


def _hakd_fake(
    student_logits, teacher_logits, labels, scalars, hakd_normalizer, proj_normalizer, upstream,
    kmm, kem, divergence, resolution, align_corners, ignore_index, reduction, student_grad, teacher_grad,
):  # fmt: skip
    dtype = compute_dtype(student_logits, teacher_logits)
    shape = _loss_shape(labels, reduction, student_logits if resolution == "feature" else None)
    loss, hakd, proj = (student_logits.new_empty(shape, dtype=dtype) for _ in range(3))
    gradients = (
        _gradient_like(student_logits, student_grad, dtype),
        _gradient_like(teacher_logits, teacher_grad, dtype),
    )
    return loss, hakd, proj, *gradients


def _hakd_backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None, None]
    needed = ctx.needs_input_grad[:2]
    if grad_loss is not None and any(needed):
        tensors, saved, factor = saved_pass(ctx, grad_loss, needed)
        gradients = [
            scale_saved(ctx, g, factor, x) if n else None for g, x, n in zip(saved, tensors[:2], needed, strict=True)
        ]
    return (*gradients, *([None] * 14))


hakd_op, _differentiable_hakd = define_both(
    "hakd_loss",
    "(Tensor student_logits, Tensor teacher_logits, Tensor labels, Tensor scalars, Tensor? hakd_normalizer,"
    " Tensor? proj_normalizer, Tensor? upstream, bool kmm, str kem, str divergence, str resolution,"
    " bool align_corners, int ignore_index, str reduction, bool student_grad, bool teacher_grad)"
    " -> (Tensor loss, Tensor hakd, Tensor proj, Tensor student_gradient, Tensor teacher_gradient)",
    fake=_hakd_fake,
    setup_context=functools.partial(save_pass, tensors=6, options=7),
    backward=_hakd_backward,
    triton=lambda: _triton().hakd_loss,
)


def hakd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, options: HakdOptions,
    temperature: float, hakd_weight: float, proj_weight: float, normalizers: tuple[Tensor | None, ...], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss with gradient, and the unweighted terms hakd and proj."""
    grad = torch.is_grad_enabled()
    o = options
    loss, hakd, proj, _, _ = _differentiable_hakd[backend](
        student_logits, teacher_logits, labels, pack_scalars(temperature, hakd_weight, proj_weight), *normalizers,
        None, o.kmm, o.kem, o.divergence, o.resolution, o.align_corners, o.ignore_index, o.reduction,
        grad and student_logits.requires_grad and o.reduction != "none",
        grad and teacher_logits.requires_grad and o.reduction != "none",
    )  # fmt: skip
    return loss, hakd, proj


# normalized_hakd_loss -------------------------------------------------------------------------------------------
# hakd_loss of what raw logits z mean: scale z + shift per class, then ReLU. The gradients are those of z, scale and
# shift; a pixel without a gradient counts exactly 0 in each, whatever its z.


def _normalized_fake(
    student_logits, student_scale, student_shift, teacher_logits, teacher_scale, teacher_shift, labels, scalars,
    hakd_normalizer, proj_normalizer, upstream, student_relu, teacher_relu,
    kmm, kem, divergence, resolution, align_corners, ignore_index, reduction, student_grad, teacher_grad,
):  # fmt: skip
    outputs = _hakd_fake(
        student_logits, teacher_logits, labels, scalars, hakd_normalizer, proj_normalizer, upstream,
        kmm, kem, divergence, resolution, align_corners, ignore_index, reduction, student_grad, teacher_grad,
    )  # fmt: skip
    dtype, classes = outputs[0].dtype, student_logits.shape[1]
    sums = (student_logits.new_empty([2, classes] if wanted else [0], dtype=dtype)
            for wanted in (student_grad, teacher_grad))  # fmt: skip
    return (*outputs, *sums)


def _normalized_backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 6
    needed = ctx.needs_input_grad[:6]
    wanted = (any(needed[:3]), any(needed[3:]))
    if grad_loss is not None and any(wanted):
        tensors, saved, factor = saved_pass(ctx, grad_loss, wanted)
        for i in range(2):
            if needed[3 * i]:
                gradients[3 * i] = scale_saved(ctx, saved[i], factor, tensors[3 * i])
            for j in range(2):
                if needed[3 * i + 1 + j]:
                    gradients[3 * i + 1 + j] = scale_gradient(saved[2 + i][j], factor, tensors[3 * i + 1 + j])
    return (*gradients, *([None] * 16))


normalized_hakd_op, _differentiable_normalized_hakd = define_both(
    "normalized_hakd_loss",
    "(Tensor student_logits, Tensor student_scale, Tensor student_shift, Tensor teacher_logits, Tensor teacher_scale,"
    " Tensor teacher_shift, Tensor labels, Tensor scalars, Tensor? hakd_normalizer, Tensor? proj_normalizer,"
    " Tensor? upstream, bool student_relu, bool teacher_relu, bool kmm, str kem, str divergence, str resolution,"
    " bool align_corners, int ignore_index, str reduction, bool student_grad, bool teacher_grad)"
    " -> (Tensor loss, Tensor hakd, Tensor proj, Tensor student_gradient, Tensor teacher_gradient,"
    " Tensor student_normalization_gradient, Tensor teacher_normalization_gradient)",
    fake=_normalized_fake,
    setup_context=functools.partial(save_pass, tensors=10, options=9),
    backward=_normalized_backward,
    triton=lambda: _triton().normalized_hakd_loss,
)


def normalized_hakd_loss(
    student: tuple[Tensor, Tensor, Tensor, bool], teacher: tuple[Tensor, Tensor, Tensor, bool], labels: Tensor,
    options: HakdOptions, temperature: float, hakd_weight: float, proj_weight: float,
    normalizers: tuple[Tensor | None, ...], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`hakd_loss` of networks given as raw logits, scale and shift [K], and whether ReLU follows."""
    now = torch.is_grad_enabled() and options.reduction != "none"
    o = options
    return _differentiable_normalized_hakd[backend](
        *student[:3], *teacher[:3], labels, pack_scalars(temperature, hakd_weight, proj_weight), *normalizers, None,
        student[3], teacher[3], o.kmm, o.kem, o.divergence, o.resolution, o.align_corners, o.ignore_index, o.reduction,
        now and any(t.requires_grad for t in student[:3]), now and any(t.requires_grad for t in teacher[:3]),
    )[:3]  # fmt: skip


# segmentation_loss ----------------------------------------------------------------------------------------------


def _segmentation_fake(
    logits, teacher_logits, labels, class_weight, scalars, task_normalizer, kd_normalizer, upstream,
    align_corners, ignore_index, reduction, grad,
):  # fmt: skip
    dtype = compute_dtype(logits, teacher_logits)
    shape = _loss_shape(labels, reduction, None)
    loss, task, kd = (logits.new_empty(shape, dtype=dtype) for _ in range(3))
    return loss, task, kd, _gradient_like(logits, grad, dtype)


def _segmentation_backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        tensors, saved, factor = saved_pass(ctx, grad_loss, (True,))
        gradient = scale_saved(ctx, saved[0], factor, tensors[0])
    return (gradient, *([None] * 11))


segmentation_op, _differentiable_segmentation = define_both(
    "segmentation_loss",
    "(Tensor logits, Tensor? teacher_logits, Tensor labels, Tensor? class_weight, Tensor scalars,"
    " Tensor? task_normalizer, Tensor? kd_normalizer, Tensor? upstream, bool align_corners, int ignore_index,"
    " str reduction, bool grad) -> (Tensor loss, Tensor task, Tensor kd, Tensor gradient)",
    fake=_segmentation_fake,
    setup_context=functools.partial(save_pass, tensors=7, options=3),
    backward=_segmentation_backward,
    triton=lambda: _triton().segmentation_loss,
)


def segmentation_loss(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, class_weight: Tensor | None,
    options: SegmentationOptions, temperature: float, task_weight: float, kd_weight: float, label_smoothing: float,
    normalizers: tuple[Tensor | None, ...], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss with gradient, and the unweighted terms task and kd."""
    o = options
    loss, task, kd, _ = _differentiable_segmentation[backend](
        logits, None if teacher_logits is None else teacher_logits.detach(), labels, class_weight,
        pack_scalars(temperature, task_weight, kd_weight, label_smoothing), *normalizers, None,
        o.align_corners, o.ignore_index, o.reduction,
        torch.is_grad_enabled() and logits.requires_grad and o.reduction != "none",
    )  # fmt: skip
    return loss, task, kd
