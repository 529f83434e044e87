"""Operator ``projected_hakd_loss``: HeteroAKD on features, the 1x1 projections included.

One pass reads both networks' features and leaves the loss, the gradients of weights and biases, and those of the logits
[B, K, h, w] (all float32 or float64, for an upstream gradient of one). The backward scales the former and takes the
latter through the weights (``project_back``), which writes the features' gradient once. With ``reduction="none"`` it
runs the pass again with ``upstream`` [B, h, w] as the pixels' factors.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from ..layout import keeps_channels_last
from ..options import HakdOptions
from .library import (
    compute_dtype,
    define_both,
    no_context,
    no_second_derivative,
    pack_scalars,
    same_backend,
    save_pass,
    saved_pass,
    scale_saved,
)

_GPU_CLASSES = 192


def able(num_classes: int) -> tuple[str, ...]:
    """Backends that have these operators for that many classes. The GPU's keep a pixel's classes in registers, and
    beyond them logits are a fair part of the features' size: torch may as well write them down."""
    return ("cpu", "cuda", "triton") if num_classes <= _GPU_CLASSES else ("cpu",)


@functools.cache
def _triton() -> types.ModuleType:
    from ..triton import projected_losses

    return projected_losses


# project_back -------------------------------------------------------------------------------------------------


def _project_back_fake(logit_gradient, weight, factor, like):
    memory_format = torch.channels_last if keeps_channels_last(like) else torch.contiguous_format
    return torch.empty_like(like, memory_format=memory_format)


_, _project_back = define_both(
    "project_back",
    "(Tensor logit_gradient, Tensor weight, Tensor? factor, Tensor like) -> Tensor",
    fake=_project_back_fake,
    setup_context=no_context,
    backward=no_second_derivative,
    triton=lambda: _triton().project_back,
)

# projected_hakd_loss -------------------------------------------------------------------------------------------


def _fake(
    student_features, teacher_features, student_weight, teacher_weight, student_bias, teacher_bias, labels, scalars,
    hakd_normalizer, proj_normalizer, upstream, kmm, kem, divergence, ignore_index, reduction,
    student_features_grad, student_weight_grad, teacher_features_grad, teacher_weight_grad,
):  # fmt: skip
    dtype = compute_dtype(
        student_features, teacher_features, student_weight, teacher_weight, student_bias, teacher_bias
    )
    batch, _, height, width = student_features.shape
    classes = student_weight.shape[0]

    def empty(wanted: bool, *shape: int) -> Tensor:
        return student_features.new_empty(shape if wanted else [0], dtype=dtype)

    loss, hakd, proj = (
        empty(True, *((batch, height, width) if reduction == "none" else ())) for _ in range(3)
    )  # fmt: skip
    return (
        loss, hakd, proj,
        empty(student_features_grad, batch, classes, height, width),
        empty(teacher_features_grad, batch, classes, height, width),
        empty(student_weight_grad, *student_weight.shape),
        empty(teacher_weight_grad, *teacher_weight.shape),
        empty(student_weight_grad and student_bias is not None, classes),
        empty(teacher_weight_grad and teacher_bias is not None, classes),
    )  # fmt: skip


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 6
    needed = ctx.needs_input_grad[:6]
    if grad_loss is not None and any(needed):
        wanted = (needed[0], needed[2] or needed[4], needed[1], needed[3] or needed[5])
        tensors, saved, factor = saved_pass(ctx, grad_loss, wanted)
        project_back = same_backend(_project_back, ctx.op, "projected_hakd_loss")
        for i in range(2):
            if needed[i]:
                gradients[i] = project_back(saved[i], tensors[2 + i], factor, tensors[i])
        for i in range(2, 6):
            if needed[i]:
                gradients[i] = scale_saved(ctx, saved[i], factor, tensors[i])
    return (*gradients, *([None] * 14))


_, _differentiable_projected_hakd = define_both(
    "projected_hakd_loss",
    "(Tensor student_features, Tensor teacher_features, Tensor student_weight, Tensor teacher_weight,"
    " Tensor? student_bias, Tensor? teacher_bias, Tensor labels, Tensor scalars, Tensor? hakd_normalizer,"
    " Tensor? proj_normalizer, Tensor? upstream, bool kmm, str kem, str divergence, int ignore_index, str reduction,"
    " bool student_features_grad, bool student_weight_grad, bool teacher_features_grad, bool teacher_weight_grad)"
    " -> (Tensor loss, Tensor hakd, Tensor proj, Tensor student_logit_gradient, Tensor teacher_logit_gradient,"
    " Tensor student_weight_gradient, Tensor teacher_weight_gradient, Tensor student_bias_gradient,"
    " Tensor teacher_bias_gradient)",
    fake=_fake,
    setup_context=functools.partial(save_pass, tensors=10, options=5),
    backward=_backward,
    triton=lambda: _triton().projected_hakd_loss,
)


def projected_hakd_loss(
    student_features: Tensor, teacher_features: Tensor, student_weight: Tensor, teacher_weight: Tensor,
    student_bias: Tensor | None, teacher_bias: Tensor | None, labels: Tensor, options: HakdOptions,
    temperature: float, hakd_weight: float, proj_weight: float, normalizers: tuple[Tensor | None, ...], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss with gradient, and the unweighted terms hakd and proj; ``options.resolution`` is "feature"."""
    now = torch.is_grad_enabled() and options.reduction != "none"

    def wanted(*tensors: Tensor | None) -> bool:
        return now and any(t is not None and t.requires_grad for t in tensors)

    o = options
    return _differentiable_projected_hakd[backend](
        student_features, teacher_features, student_weight, teacher_weight, student_bias, teacher_bias, labels,
        pack_scalars(temperature, hakd_weight, proj_weight), *normalizers, None, o.kmm, o.kem, o.divergence,
        o.ignore_index, o.reduction, wanted(student_features), wanted(student_weight, student_bias),
        wanted(teacher_features), wanted(teacher_weight, teacher_bias),
    )[:3]  # fmt: skip
