"""The CUDA kernels, run on the host: ``emulation.hakd_loss(...)``, ``segmentation_loss(...)`` and
``projected_hakd_loss(...)`` take what the public functions take, and ``order``, the order in which threads and blocks
run.

The public functions themselves check the arguments and hold the autograd formulas; the operators they call are twins of
the compiled ones, whose implementation is the launcher of csrc/cuda, compiled by g++ (build.py).
"""

from __future__ import annotations

import functools
import types
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hetero_kernels import functional
from hetero_kernels.ops import backends, library, pixel_losses, projected_losses

from . import build

ORDERS = ("forward", "reverse", "shuffled")
NAME = "emulated"


@functools.cache
def module() -> types.ModuleType:
    return build.load()


class Settings:
    """What the next calls run with: the order, its seed, and the card whose plans they take."""

    order = "forward"
    seed = 0
    multiprocessors = 132
    shared_per_block = 227 << 10


def _card() -> Any:
    card = module().Card()
    card.multiprocessors = Settings.multiprocessors
    card.shared_per_block = Settings.shared_per_block
    return card


def _array(x: Tensor | None, writable: bool = False) -> Any:
    if x is None:
        return None
    storage = x.untyped_storage()
    return module().Array(
        x.data_ptr(), storage.data_ptr(), storage.nbytes(), list(x.shape), list(x.stride()),
        str(x.dtype).removeprefix("torch."), writable,
    )  # fmt: skip


def _refuse_float64(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype == torch.float64:
            raise TypeError(f"{name} is float64, expected float32, bfloat16 or float16")


def _unwritten(wanted: bool, *shape: int) -> Tensor:
    """NaN: what a kernel forgets to write shows."""
    return torch.full(shape if wanted else (0,), torch.nan, dtype=torch.float32, device="cpu")


def _run(
    run: str, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: list[float], temperature: float,
    normalizers: tuple[Tensor | None, ...], upstream: Tensor | None, resolution: str, align_corners: bool,
    ignore_index: int, reduction: str, gradients: tuple[bool, bool], extra: tuple,
) -> tuple[Tensor, ...]:  # fmt: skip
    _refuse_float64(student=student, teacher=teacher)
    size = student.shape[2:] if resolution == "feature" else labels.shape[1:]
    shape = (student.shape[0], *size) if reduction == "none" else ()
    outputs = [_unwritten(True, *shape) for _ in range(3)]
    networks = zip((student, teacher), gradients, strict=True)
    out = [_unwritten(wanted, *x.shape) if x is not None else _unwritten(False) for x, wanted in networks]
    if gradients[1] and weights[1] == 0:
        out[1].zero_()
    normalizers = tuple(None if n is None else n.float() for n in normalizers)
    upstream = None if upstream is None else upstream.float()
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    call = module().Call(
        _array(student), _array(teacher), _array(out[0], True) if gradients[0] else None,
        _array(out[1], True) if gradients[1] else None, _array(upstream), _array(labels),
        [_array(n) for n in normalizers], [_array(o, True) for o in outputs], resolution == "label", align_corners,
        ignore_index, reduction, temperature, weights,
    )  # fmt: skip
    getattr(module(), run)(call, *extra, _card())
    return (*outputs, *out)


def _hakd(
    student: Tensor, teacher: Tensor, labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None,
    proj_normalizer: Tensor | None, upstream: Tensor | None, kmm: bool, kem: str, divergence: str, resolution: str,
    align_corners: bool, ignore_index: int, reduction: str, student_grad: bool, teacher_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    temperature, *weights = scalars.tolist()
    return _run(
        "hakd_loss", student, teacher, labels, weights, temperature, (hakd_normalizer, proj_normalizer), upstream,
        resolution, align_corners, ignore_index, reduction, (student_grad, teacher_grad),
        (kmm, ("none", "class", "spatial").index(kem), divergence == "ce"),
    )  # fmt: skip


def _segmentation(
    student: Tensor, teacher: Tensor | None, labels: Tensor, class_weight: Tensor | None, scalars: Tensor,
    task_normalizer: Tensor | None, kd_normalizer: Tensor | None, upstream: Tensor | None, align_corners: bool,
    ignore_index: int, reduction: str, grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    temperature, task, kd, smoothing = scalars.tolist()
    class_weight = None if class_weight is None else class_weight.float().contiguous()
    return _run(
        "segmentation_loss", student, teacher, labels, [task, kd], temperature, (task_normalizer, kd_normalizer),
        upstream, "label", align_corners, ignore_index, reduction, (grad, False), (_array(class_weight), smoothing),
    )[:4]  # fmt: skip


def _projected(
    student: Tensor, teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor, student_bias: Tensor | None,
    teacher_bias: Tensor | None, labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None,
    proj_normalizer: Tensor | None, upstream: Tensor | None, kmm: bool, kem: str, divergence: str, ignore_index: int,
    reduction: str, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _refuse_float64(
        student_features=student, teacher_features=teacher, student_weight=student_weight,
        teacher_weight=teacher_weight, student_bias=student_bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    temperature, *weights = scalars.tolist()
    batch, _, height, width = student.shape
    outputs = [_unwritten(True, *((batch, height, width) if reduction == "none" else ())) for _ in range(3)]
    sides, gradients = [], []
    for weight, bias, logits_wanted, weight_wanted in (
        (student_weight, student_bias, *wanted[:2]), (teacher_weight, teacher_bias, *wanted[2:]),
    ):  # fmt: skip
        out = [
            _unwritten(logits_wanted, batch, weight.shape[0], height, width),
            _unwritten(weight_wanted, *weight.shape),
            _unwritten(weight_wanted and bias is not None, weight.shape[0]),
        ]
        if sides and weights[1] == 0:
            out = [torch.zeros_like(g) for g in out]
        sides += [_array(weight), _array(bias), [_array(g, True) if g.numel() else None for g in out]]
        gradients.append(out)
    normalizers = [None if n is None else n.float() for n in (hakd_normalizer, proj_normalizer)]
    upstream = None if upstream is None else upstream.float()
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    call = module().Call(
        _array(student), _array(teacher), None, None, _array(upstream), _array(labels),
        [_array(n) for n in normalizers], [_array(o, True) for o in outputs], False, False, ignore_index, reduction,
        temperature, weights,
    )  # fmt: skip
    kinds = (kmm, ("none", "class").index(kem), divergence == "ce")
    module().projected_hakd_loss(call, *sides, *kinds, _card())
    return (*outputs, *(g for pair in zip(*gradients, strict=True) for g in pair))


def _project_back(logit_gradient: Tensor, weight: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    channels_last = like.stride(1) == 1 and like.shape[1] > 1
    out = torch.full_like(
        like, torch.nan, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    logit_gradient = logit_gradient.contiguous()
    factor = None if factor is None else factor.float()
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    module().project_back(_array(logit_gradient), _array(weight), _array(factor), _array(out, True), _card())
    return out


def _register(name: str, table: dict, implementation: Any) -> None:
    _, table[NAME] = library.define(f"{name}_{NAME}", *library.definitions[name])
    library._library.impl(f"{name}_{NAME}", lambda *args: implementation(*args[:-1]), "CPU")


_register("hakd_loss", pixel_losses._differentiable_hakd, _hakd)
_register("segmentation_loss", pixel_losses._differentiable_segmentation, _segmentation)
_register("project_back", projected_losses._project_back, _project_back)
_register("projected_hakd_loss", projected_losses._differentiable_projected_hakd, _projected)


_really_able = projected_losses.able


def _able(num_classes: int) -> tuple[str, ...]:
    return (NAME,) if "cuda" in _really_able(num_classes) else ()


def _emulated(public: Any) -> Any:
    @functools.wraps(public)
    def call(*args: Any, order: str | None = None, **kwargs: Any) -> Any:
        if order is not None:
            Settings.order = ORDERS[ORDERS.index(order)]
        with (
            mock.patch.object(backends, "select", lambda backend, device: NAME),
            mock.patch.object(projected_losses, "able", _able),
        ):
            return public(*args, **kwargs)

    return call


hakd_loss = _emulated(functional.hakd_loss)
segmentation_loss = _emulated(functional.segmentation_loss)
projected_hakd_loss = _emulated(functional.projected_hakd_loss)


def take_traffic() -> tuple[int, int, int, list[str]]:
    """Bytes read and written by kernels since the last call, launches, and the kernels' names."""
    read, written, launches, names, *_ = module().take_traffic()
    return read, written, launches, names.split()


def take_traffic_by_buffer() -> dict[str, tuple[int, int]]:
    """Bytes read and written since the last call, by the buffers' names."""
    return module().take_traffic()[4]


def take_loads() -> dict[str, int]:
    """How often threads read since the last call, by the buffers' names."""
    return module().take_traffic()[5]
