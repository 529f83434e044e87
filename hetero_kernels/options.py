"""The losses' options, each documented once; section numbers are those of docs/mathematics.md.

These are the choices that select code. Weights and temperatures are plain numbers that may change every step
and are arguments of the functions themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kem = Literal["class", "spatial", "none"]
Divergence = Literal["kl", "ce"]
Resolution = Literal["label", "feature"]
Reduction = Literal["mean", "sum", "none"]
Projector = Literal["conv_bn", "conv_bn_relu", "conv"]
BACKENDS = ("reference", "cpu", "cuda", "triton")


CHOICES: dict[str, tuple[str, ...]] = {
    "kem": get_args(Kem),
    "divergence": get_args(Divergence),
    "resolution": get_args(Resolution),
    "reduction": get_args(Reduction),
    "projector": get_args(Projector),
}


def check_backend(backend: object, source: str = "backend") -> None:
    """One of :data:`BACKENDS` or None; whether it is there is seen when it is to run."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))} or None")


def check_option(name: str, value: object) -> None:
    """Raises TypeError or ValueError naming the option, what came and what was expected."""
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, CHOICES[name]))}")
    elif name == "ignore_index":
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an int")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {value!r}, expected an int of 64 bits")
    elif not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")


@dataclass(frozen=True)
class HakdOptions:
    """Options of ``hakd_loss`` and ``projected_hakd_loss``."""

    kmm: bool = True
    """Mix student and teacher logits by reliability (section 3); False takes the teacher's."""
    kem: Kem = "class"
    """Weight softmax over classes per pixel, over the image's valid pixels per class, or none (section 4)."""
    divergence: Divergence = "kl"
    """``"ce"`` drops the constant part of the KL term: same gradient, other value (section 5)."""
    resolution: Resolution = "label"
    """Loss grid: the labels' (logits are interpolated) or the student's (labels are sampled) (section 1)."""
    align_corners: bool = False
    """As in ``torch.nn.functional.interpolate(mode="bilinear")``."""
    ignore_index: int = 255
    """Label of pixels that count nowhere; any int, also negative or a class index."""
    reduction: Reduction = "mean"
    """``"mean"`` divides each term by its own divisor, ``"none"`` gives [B, loss grid] (section 8)."""

    def __post_init__(self) -> None:
        for name in ("kmm", "kem", "divergence", "resolution", "align_corners", "ignore_index", "reduction"):
            check_option(name, getattr(self, name))


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of ``segmentation_loss``; the fields mean what they mean in :class:`HakdOptions`."""

    align_corners: bool = False
    ignore_index: int = 255
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        for name in ("align_corners", "ignore_index", "reduction"):
            check_option(name, getattr(self, name))
