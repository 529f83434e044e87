"""Inputs and measures that the kernel tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.covering import pairwise as pairwise

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# (B, K, student grid, teacher grid, labels)
SHAPES = {
    "stride 8": (2, 5, (9, 12), (9, 12), (72, 96)),
    "mixed strides": (2, 7, (8, 11), (4, 5), (33, 47)),
    "non-integer": (1, 4, (13, 9), (7, 17), (61, 50)),
    "same grid": (2, 6, (17, 23), (17, 23), (17, 23)),
    "downsampled": (1, 3, (40, 31), (20, 9), (11, 13)),
    "stride 2": (1, 19, (10, 40), (20, 80), (20, 80)),
    "many classes": (1, 150, (5, 6), (3, 3), (20, 24)),
    "one coarse pixel": (2, 3, (1, 1), (1, 1), (9, 21)),
    "one pixel": (1, 2, (1, 1), (1, 1), (1, 1)),
    "one class": (1, 1, (3, 4), (2, 2), (12, 16)),
    "one row": (1, 3, (1, 40), (1, 10), (1, 320)),
}

OPTIONS = {
    "temperature": (1.0, 2.0, 4.0, 1.5),
    "kmm": (True, False),
    "kem": ("class", "spatial", "none"),
    "divergence": ("kl", "ce"),
    "resolution": ("label", "feature"),
    "align_corners": (False, True),
    "reduction": ("mean", "sum", "none"),
}


def make_labels(batch: int, size: tuple[int, int], num_classes: int, ignored: float = 0.1, block: int = 5) -> Tensor:
    """Blocks of one class with scattered ignored pixels (255)."""
    h, w = size
    coarse = torch.randint(0, num_classes, (batch, -(-h // block), -(-w // block)))
    labels = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w].contiguous()
    return labels.masked_fill(torch.rand(batch, h, w) < ignored, 255)


def make_logits(kind: str, shape: tuple[int, ...], labels: Tensor) -> Tensor:
    """``randn`` (times 3), ``trained`` (N(+-10, 4), the labelled class high), ``huge`` (up to 1e4) or ``mixed``
    (trained with a few huge pixels)."""
    if kind == "randn":
        return torch.randn(shape) * 3
    if kind == "huge":
        return (torch.randn(shape) * 4000).clamp(-1e4, 1e4)
    logits = torch.randn(shape) * 2 - 10
    coarse = torch.nn.functional.interpolate(labels[:, None].float(), shape[2:], mode="nearest").long()
    logits.scatter_add_(1, coarse.clamp(max=shape[1] - 1), torch.full_like(coarse, 20, dtype=torch.float32))
    if kind == "mixed":
        logits[..., : max(1, shape[3] // 4)] *= 50
    return logits


def make_case(shape: str, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (float32) and labels of a named shape."""
    torch.manual_seed(seed)
    batch, classes, student, teacher, size = SHAPES[shape]
    labels = make_labels(batch, size, classes)
    return (
        make_logits(kind, (batch, classes, *student), labels),
        make_logits(kind, (batch, classes, *teacher), labels),
        labels,
    )


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, 0 for two exact zeros; NaN where either has one."""
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return 0.0 if difference == 0 else (difference / size).item()


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Independent leaves that require gradients."""
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def backward(loss: Tensor, scale: float = 1.0) -> None:
    """Backpropagates ``scale`` times the loss; per-pixel losses with an uneven upstream gradient."""
    if loss.dim() == 0:
        (loss * scale).backward()
    else:
        loss.backward(
            torch.linspace(-scale, 1.5 * scale, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
        )


@contextlib.contextmanager
def other_defaults(dtype: torch.dtype) -> Iterator[None]:
    """With another default dtype, and a default device on which nothing has a value."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
