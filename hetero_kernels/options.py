"""The losses' options, each documented once; section numbers are those of docs/mathematics.md.

These are the choices that select code. Weights and temperatures are plain numbers that may change every step
and are arguments of the functions themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

Kem = Literal["class", "spatial", "none"]
Divergence = Literal["kl", "ce"]
Resolution = Literal["label", "feature"]
Reduction = Literal["mean", "sum", "none"]
Projector = Literal["conv_bn", "conv_bn_relu", "conv"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError naming the option, what came and what was expected."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _check(options: Any) -> None:
    for field_name, kind in get_type_hints(type(options)).items():
        value = getattr(options, field_name)
        if get_args(kind):
            check_choice(field_name, value, kind)
        elif kind is bool and not isinstance(value, bool):
            raise TypeError(f"{field_name} is {value!r}, expected True or False")
        elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{field_name} is {value!r}, expected an int")


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
        _check(self)


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of ``segmentation_loss``; the fields mean what they mean in :class:`HakdOptions`."""

    align_corners: bool = False
    ignore_index: int = 255
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _check(self)


def option_names(options: type) -> tuple[str, ...]:
    """Names of an options class, in the order of its ops' schemas."""
    return tuple(field.name for field in fields(options))
