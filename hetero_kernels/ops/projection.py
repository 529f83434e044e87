"""Operators ``project`` and ``project_gradients``: a 1x1 convolution of features, with batch statistics, and back.

``project`` reads the features once: raw logits z = W (f - f0) and, per class, what batch norm needs of them. f0 is a
value near each channel's mean: with batch statistics b + W f0 enters the running mean only, and where channels lie far
from 0 float32 would lose the logits' last digits to it. What normalization makes of the statistics is K-sized code
(:mod:`hetero_kernels.projection`); the losses on the logits take its scale and shift (``normalized_hakd_loss``).

The backward reads the features once more: dz = g + dmean / n + 2 dM2 (z - mean), formed on the way, gives the gradients
of features and weight; what W f0 gets is the weight's alone. All pixels count, ignored ones too, as in torch.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from ..layout import reads_channels_last
from .library import compute_dtype, define_both, no_context, no_second_derivative, same_backend

ROUNDINGS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What factors are rounded to first, as ``torch.autocast`` would; anything else is "none"."""


@functools.cache
def _triton() -> types.ModuleType:
    from ..triton import projection

    return projection


# project_gradients ---------------------------------------------------------------------------------------------


def _gradients_fake(
    logit_gradient, statistics_gradient, features, weight, logits, pilot, statistics, rounding,
    features_grad, weight_grad,
):  # fmt: skip
    memory_format = torch.channels_last if reads_channels_last(features) else torch.contiguous_format
    by_features = torch.empty_like(features, memory_format=memory_format) if features_grad else features.new_empty([0])
    return by_features, torch.empty_like(weight, memory_format=torch.contiguous_format) if weight_grad else (
        features.new_empty([0], dtype=logits.dtype)
    )


_, _project_gradients = define_both(
    "project_gradients",
    "(Tensor? logit_gradient, Tensor? statistics_gradient, Tensor features, Tensor weight, Tensor logits, Tensor pilot,"
    " Tensor statistics, str rounding, bool features_grad, bool weight_grad)"
    " -> (Tensor features_gradient, Tensor weight_gradient)",
    fake=_gradients_fake,
    setup_context=no_context,
    backward=no_second_derivative,
    triton=lambda: _triton().project_gradients,
)

# project -------------------------------------------------------------------------------------------------------


def _fake(features, weight, statistics, rounding):
    dtype, classes = compute_dtype(features, weight), weight.shape[0]
    batch, channels, height, width = features.shape
    return (
        features.new_empty([batch, classes, height, width], dtype=dtype),
        features.new_empty([channels if statistics else 0], dtype=dtype),
        features.new_empty([4 if statistics else 0, classes if statistics else 0], dtype=torch.float64),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, weight, _, ctx.rounding = inputs
    ctx.save_for_backward(features, weight, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, by_logits: Tensor | None, _: object, by_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    if (by_logits is None and by_statistics is None) or not any(needed):
        return None, None, None, None
    project_gradients = same_backend(_project_gradients, ctx.op, "project")
    gradients = project_gradients(by_logits, by_statistics, *ctx.saved_tensors, ctx.rounding, *needed)
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None)


project_op, _differentiable_project = define_both(
    "project",
    "(Tensor features, Tensor weight, bool statistics, str rounding)"
    " -> (Tensor logits, Tensor pilot, Tensor statistics_of_logits)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    triton=lambda: _triton().project,
)


def project(
    features: Tensor, weight: Tensor, statistics: bool, rounding: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, C, h, w] by weight [K, C]: raw logits [B, K, h, w], float32 (float64), by one of the :func:`able`.

    With ``statistics`` also the pilot f0 [C] that was subtracted from the features and, float64 [4, K], the number of
    pixels, the logits' mean, the sum of their squared differences from it, and W f0; else both are empty.
    """
    return _differentiable_project[backend](features, weight, statistics, rounding)


def able() -> tuple[str, ...]:
    """Backends that have these operators, and ``normalized_hakd_loss`` for what they give."""
    return ("cpu", "cuda", "triton")
