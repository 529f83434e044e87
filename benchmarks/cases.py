"""The benchmarked shapes, and the one function that makes a step of each: used for time and for memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetero_kernels import functional, reference


@dataclass(frozen=True)
class Case:
    """One loss on one shape."""

    name: str
    loss: str  # "hakd_loss" or "segmentation_loss"
    shape: tuple[int, int, int, int]  # logits [B, K, h, w] of both networks
    size: tuple[int, int]  # labels H, W
    options: dict[str, Any] = field(default_factory=dict)
    teacher: bool = True

    @property
    def elements(self) -> int:
        """Pixels of the loss grid times classes."""
        grid = self.shape[2:] if self.options.get("resolution") == "feature" else self.size
        return self.shape[0] * self.shape[1] * grid[0] * grid[1]


PIXEL_LOSSES = {
    case.name: case
    for case in (
        Case("hakd K=19", "hakd_loss", (1, 19, 64, 128), (512, 1024), {"temperature": 2.0}),
        Case("hakd K=150", "hakd_loss", (1, 150, 64, 64), (512, 512), {"temperature": 2.0}),
        Case("hakd feature", "hakd_loss", (2, 19, 64, 128), (512, 1024), {"temperature": 2.0, "resolution": "feature"}),
        Case("CE + KD", "segmentation_loss", (1, 19, 64, 128), (512, 1024)),
        Case("CE", "segmentation_loss", (1, 19, 64, 128), (512, 1024), teacher=False),
        Case("tiny", "hakd_loss", (1, 2, 8, 8), (64, 64), {"temperature": 2.0}),
    )
}

PROVIDERS = ("reference", "compile", "cpu")


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """Student logits (require gradients), teacher logits or None, labels: blocks of 32 with a tenth ignored."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(case.shape, generator=generator, requires_grad=True)
    teacher = torch.randn(case.shape, generator=generator) if case.teacher else None
    height, width = case.size
    coarse = torch.randint(0, case.shape[1], (case.shape[0], -(-height // 32), -(-width // 32)), generator=generator)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width].contiguous()
    ignored = torch.rand(labels.shape, generator=generator) < 0.1
    return student, teacher, labels.masked_fill(ignored, 255)


def make_step(case: Case, provider: str) -> Callable[[], Tensor]:
    """A function that runs forward and backward once on fixed inputs and returns the loss."""
    student, teacher, labels = make_inputs(case)
    module = functional if provider not in ("reference", "compile") else reference
    function = getattr(module, case.loss)
    options = dict(case.options)
    if module is functional:
        options["backend"] = provider
    if case.loss == "hakd_loss":

        def loss() -> Tensor:
            return function(student, teacher, labels, **options)
    else:

        def loss() -> Tensor:
            return function(student, labels, teacher, **options)

    forward = torch.compile(loss, fullgraph=True, dynamic=False) if provider == "compile" else loss

    def step() -> Tensor:
        student.grad = None
        value = forward()
        value.backward()
        return value.detach()

    return step
