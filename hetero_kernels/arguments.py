"""Checks of the public functions' tensor arguments: metadata only, so they cost no synchronisation.

Every error names the argument, what came and what was expected.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64, torch.int32, torch.uint8)
LOGITS = ("out", "logits")
"""Where a network's output holds the logits if it is a dictionary: torchvision's, Hugging Face's."""


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return f"{type(x).__name__} of {list(x)!r:.80}" if isinstance(x, Mapping) else f"{type(x).__name__} {x!r:.80}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_maps(name: str, x: object, kind: str) -> None:
    """A floating [B, channels, h, w] tensor with at least one channel and one position."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {_describe(x)}, expected a Tensor [B, {kind}, h, w]{_what_to_pass(name, x)}")
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        hint = ""
        if x.dim() == 3:
            hint = f"; tokens [B, N, {kind}] become a map by {name}.transpose(1, 2).unflatten(2, (h, w))"
        raise ValueError(f"{name} is {_describe(x)}, expected [B, {kind}, h, w] with {kind}, h, w >= 1{hint}")
    check_floating(name, x)


def _what_to_pass(name: str, x: object) -> str:
    """Where in a network's whole output the tensor is."""
    if isinstance(x, Mapping):
        return "".join(f"; pass {name}[{key!r}]" for key in LOGITS if key in x)
    return f"; pass one of them, such as {name}[0]" if isinstance(x, (list, tuple)) and x else ""


def check_floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless ``x`` has one of the dtypes that are computed with: float8 is none of them."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} is {_describe(x)}, expected one of {_names(FLOATING)}")


def check_pair(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor, channels: bool) -> None:
    """Two networks' maps: same batch, same device and, where asked, the same number of channels."""
    if student.shape[0] != teacher.shape[0] or (channels and student.shape[1] != teacher.shape[1]):
        expected = "the same batch and class sizes" if channels else "the same batch size"
        raise ValueError(
            f"{teacher_name} is {_describe(teacher)}, expected {expected} as {student_name} {list(student.shape)}"
        )
    check_device(teacher_name, teacher, student)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError where ``x`` lives on another device than ``like``."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device} like the other tensors")


def check_compute_dtype(backend: str, **tensors: Tensor | None) -> None:
    """Backends of GPUs compute in float32: they refuse float64."""
    for name, x in tensors.items():
        if backend in ("cuda", "triton") and x is not None and x.dtype == torch.float64:
            raise TypeError(
                f"{name} is float64, expected float32, bfloat16 or float16: backend {backend!r} computes in float32 "
                "(backend='reference' computes in float64 on any device)"
            )


_looked_for_probabilities = False


def look_for_probabilities(name: str, x: Tensor) -> None:
    """Warns where the first maps on a CPU that come here, eagerly, add up to 1 everywhere: a softmax's output taken
    for logits. Others are not looked at: it costs a pass, and a synchronisation on a GPU."""
    global _looked_for_probabilities
    plain = type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0 and x.shape[1] > 1
    if _looked_for_probabilities or torch.compiler.is_compiling() or not plain:
        return
    if torch._C._are_functorch_transforms_active():
        return
    _looked_for_probabilities = True
    values = x.detach().float()
    if bool(((values.sum(1) - 1).abs() < 0.02).all()) and bool((values >= 0).all()):
        warnings.warn(
            f"{name} add up to 1 over the classes at every pixel: probabilities, it seems, where logits are expected",
            RuntimeWarning,
            stacklevel=3,
        )


def check_labels(labels: object, batch: int, num_classes: int, like: Tensor) -> None:
    """Integer [B, H, W] on the device of ``like``."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is {_describe(labels)}, expected an integer Tensor [B, H, W]")
    if labels.dim() != 3 or labels.shape[0] != batch or min(labels.shape[1:]) < 1:
        hint = ""
        if labels.dim() == 4:
            hint = "; use labels.squeeze(1)" if labels.shape[1] == 1 else "; use labels.argmax(1) if it is one-hot"
        raise ValueError(f"labels is {_describe(labels)}, expected [B, H, W] with B={batch} and H, W >= 1{hint}")
    if labels.dtype not in LABELS:
        raise TypeError(f"labels is {_describe(labels)}, expected one of {_names(LABELS)}")
    if labels.dtype == torch.uint8 and num_classes > 255:
        raise ValueError(f"labels is uint8, which cannot hold {num_classes} classes; use int32 or int64")
    check_device("labels", labels, like)


def label_values_wanted() -> bool:
    """Whether ``HETERO_KERNELS_CHECK_LABELS=1`` asks for labels to be checked at the price of a synchronisation."""
    return not torch.compiler.is_compiling() and os.environ.get("HETERO_KERNELS_CHECK_LABELS") == "1"


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """The values too, on any device, where :func:`label_values_wanted`."""
    if label_values_wanted():
        labels = labels.long()  # an ignore_index outside the labels' dtype would wrap around
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
        if wrong.any():
            values = labels[wrong].unique().tolist()[:8]
            raise RuntimeError(
                f"labels holds {values}, expected classes in [0, {num_classes}) or ignore_index={ignore_index}"
            )


def check_class_weight(x: Tensor, num_classes: int, like: Tensor) -> None:
    """A floating [K] tensor that is a constant, as in ``F.cross_entropy``."""
    check_vector("class_weight", x, num_classes, like)
    if x.requires_grad:
        raise ValueError("class_weight requires gradients, expected a constant: there is no derivative by it")


def check_vector(name: str, x: object, size: int, like: Tensor) -> None:
    """A floating [size] tensor on the device of ``like``."""
    if not isinstance(x, Tensor) or x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{name} is {_describe(x)}, expected a floating Tensor [{size}]")
    check_floating(name, x)
    check_device(name, x, like)


def check_projection(name: str, weight: object, bias: object, features: Tensor, num_classes: int | None) -> None:
    """Weight [K, C] (K given or free) and bias [K] or None of a 1x1 convolution on ``features``."""
    k = "K" if num_classes is None else str(num_classes)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 2
        or weight.shape[0] < 1
        or weight.shape[1] != features.shape[1]
        or weight.shape[0] != (num_classes or weight.shape[0])
    ):
        raise ValueError(f"{name}_weight is {_describe(weight)}, expected a floating Tensor [{k}, {features.shape[1]}]")
    check_floating(f"{name}_weight", weight)
    check_device(f"{name}_weight", weight, features)
    if bias is not None:
        check_vector(f"{name}_bias", bias, weight.shape[0], features)


TEMPERATURES = (1e-6, 1e6)  # outside, 1 / T or T^2 leave float32's useful range


def check_temperature(name: str, x: object) -> None:
    """A real number within :data:`TEMPERATURES`. Skipped while compiling; the operators check it then."""
    check_number(name, x, positive=True)
    if not torch.compiler.is_compiling() and not TEMPERATURES[0] <= float(x) <= TEMPERATURES[1]:  # type: ignore[arg-type]
        raise ValueError(f"{name} is {x}, expected a number in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}]")


def check_number(name: str, x: object, *, positive: bool = False, below: float | None = None) -> None:
    """A finite real number >= 0 (or > 0). Skipped while compiling, where it would pin the value."""
    if torch.compiler.is_compiling():
        return
    wanted = ("> 0" if positive else ">= 0") + (f" and < {below}" if below is not None else "")
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} is {_describe(x)}, expected a number {wanted}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or value < 0 or (positive and value == 0) or (below is not None and value >= below):
        raise ValueError(f"{name} is {x}, expected a finite number {wanted}")


def check_terms(normalizer: Mapping[str, Any], terms: Sequence[str]) -> None:
    """A normalizer's keys are names of terms: by another one a divisor would be lost."""
    if unknown := set(normalizer) - set(terms):
        raise ValueError(
            f"normalizer has {sorted(map(str, unknown))}, expected a 0-dim Tensor or keys among {list(terms)}"
        )


def split_normalizer(normalizer: object, terms: tuple[str, ...], like: Tensor) -> tuple[Tensor | None, ...]:
    """The divisor of each term: one 0-dim tensor for all of them, or a mapping from term to tensor."""
    if normalizer is None:
        return (None,) * len(terms)
    chosen: Mapping[str, Any] = normalizer if isinstance(normalizer, Mapping) else dict.fromkeys(terms, normalizer)
    check_terms(chosen, terms)
    for term, value in chosen.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() != 0 or value.is_complex():
            raise ValueError(f"normalizer for {term!r} is {_describe(value)}, expected a real 0-dim Tensor")
        if value.is_floating_point():
            check_floating(f"normalizer for {term!r}", value)
        check_device(f"normalizer for {term!r}", value, like)
    # Constants, like the labels they count.
    return tuple(None if chosen.get(term) is None else chosen[term].detach() for term in terms)
