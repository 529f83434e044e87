"""The CUDA kernels, run on the host: ``emulation.hakd_loss(...)`` and ``emulation.segmentation_loss(...)`` take what
the public functions take, and ``order``, the order in which threads and blocks run.

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
from hetero_kernels.ops import backends, library, pixel_losses

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


def _run(
    run: str, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: list[float], temperature: float,
    normalizers: tuple[Tensor | None, ...], upstream: Tensor | None, resolution: str, align_corners: bool,
    ignore_index: int, reduction: str, gradients: tuple[bool, bool], extra: tuple,
) -> tuple[Tensor, ...]:  # fmt: skip
    for name, x in (("student", student), ("teacher", teacher)):
        if x is not None and x.dtype == torch.float64:
            raise TypeError(f"{name} is float64, expected float32, bfloat16 or float16")
    size = student.shape[2:] if resolution == "feature" else labels.shape[1:]
    shape = (student.shape[0], *size) if reduction == "none" else ()
    # NaN: what a kernel forgets to write shows.
    outputs = [torch.full(shape, torch.nan) for _ in range(3)]
    networks = zip((student, teacher), gradients, strict=True)
    out = [torch.full(x.shape if wanted and x is not None else (0,), torch.nan) for x, wanted in networks]
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


def _register(name: str, formulas: tuple, table: dict, implementation: Any) -> None:
    schema = str(getattr(torch.ops.hetero_kernels, name).default._schema).removeprefix(f"{library.NAMESPACE}::{name}")
    _, table[NAME] = library.define(f"{name}_{NAME}", schema, *formulas)
    library._library.impl(f"{name}_{NAME}", implementation, "CPU")


_register(
    "hakd_loss",
    (pixel_losses._hakd_fake, pixel_losses._hakd_setup, pixel_losses._hakd_backward),
    pixel_losses._differentiable_hakd,
    _hakd,
)
_register(
    "segmentation_loss",
    (pixel_losses._segmentation_fake, pixel_losses._segmentation_setup, pixel_losses._segmentation_backward),
    pixel_losses._differentiable_segmentation,
    _segmentation,
)


def _emulated(public: Any) -> Any:
    @functools.wraps(public)
    def call(*args: Any, order: str | None = None, **kwargs: Any) -> Any:
        if order is not None:
            Settings.order = ORDERS[ORDERS.index(order)]
        with mock.patch.object(backends, "select", lambda backend, device: NAME):
            return public(*args, **kwargs)

    return call


hakd_loss = _emulated(functional.hakd_loss)
segmentation_loss = _emulated(functional.segmentation_loss)


def take_traffic() -> tuple[int, int, int, list[str]]:
    """Bytes read and written by kernels since the last call, launches, and the kernels' names."""
    read, written, launches, names = module().take_traffic()
    return read, written, launches, names.split()
