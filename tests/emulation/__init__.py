"""The CUDA kernels, run on the host: ``emulation.hakd_loss(...)``, ``segmentation_loss(...)`` and
``projected_hakd_loss(...)`` take what the public functions take, and ``order``, the order in which threads and blocks
run.

The public functions themselves check the arguments and hold the autograd formulas; the operators they call are twins of
the compiled ones, whose implementation is the launcher of csrc/cuda, compiled by g++ (build.py).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hetero_kernels import functional
from hetero_kernels.layout import keeps_channels_last, reads_channels_last
from hetero_kernels.ops import backends, library, pixel_losses, projected_losses, projection

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
    normalizations: tuple = (),
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
    getattr(module(), run)(call, *normalizations, *extra, _card())
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


def _normalized_hakd(
    student: Tensor, student_scale: Tensor, student_shift: Tensor, teacher: Tensor, teacher_scale: Tensor,
    teacher_shift: Tensor, labels: Tensor, scalars: Tensor, hakd_normalizer: Tensor | None,
    proj_normalizer: Tensor | None, upstream: Tensor | None, student_relu: bool, teacher_relu: bool, kmm: bool,
    kem: str, divergence: str, resolution: str, align_corners: bool, ignore_index: int, reduction: str,
    student_grad: bool, teacher_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    temperature, *weights = scalars.tolist()
    normalizations, sums, kept = [], [], []
    for scale, shift, relu, wanted in (
        (student_scale, student_shift, student_relu, student_grad),
        (teacher_scale, teacher_shift, teacher_relu, teacher_grad),
    ):
        sums.append(_unwritten(wanted, 2, scale.shape[0]))
        kept += [scale.float().contiguous(), shift.float().contiguous()]
        given = [*map(_array, kept[-2:]), _array(sums[-1], True) if wanted else None]
        normalizations += [given, relu]
    if weights[1] == 0:
        sums[1].zero_()
    run = _run(
        "normalized_hakd_loss", student, teacher, labels, weights, temperature, (hakd_normalizer, proj_normalizer),
        upstream, resolution, align_corners, ignore_index, reduction, (student_grad, teacher_grad),
        (kmm, ("none", "class", "spatial").index(kem), divergence == "ce"), tuple(normalizations),
    )  # fmt: skip
    return (*run, *sums)


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


def _empty_features(like: Tensor, channels_last: bool) -> tuple[Tensor, int, int]:
    """For their gradient, and the strides of its channels and pixels, whatever torch says of axes of length 1."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.full_like(like, torch.nan, memory_format=memory_format)
    return out, *((1, like.shape[1]) if channels_last else (like.shape[2] * like.shape[3], 1))


def _project_back(logit_gradient: Tensor, weight: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    out, *strides = _empty_features(like, keeps_channels_last(like))
    factor = None if factor is None else factor.float()
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    gradient = [_array(logit_gradient.contiguous()), None, None, None]
    module().project_back(gradient, _array(weight), _array(factor), _array(out, True), *strides, _card())
    return out


def _rounded(weight: Tensor, rounding: str) -> Tensor:
    return weight if rounding == "none" else weight.to(getattr(torch, rounding))


def _project(features: Tensor, weight: Tensor, statistics: bool, rounding: str) -> tuple[Tensor, ...]:
    _refuse_float64(features=features, weight=weight)
    batch, channels, height, width = features.shape
    classes = weight.shape[0]
    factors = _rounded(weight, rounding)
    logits, pilot = _unwritten(True, batch, classes, height, width), _unwritten(statistics, channels)
    found = torch.full((4, classes) if statistics else (0, 0), torch.nan, dtype=torch.float64, device="cpu")
    if logits.numel() == 0:
        return logits, pilot.zero_(), found.zero_()
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    call = module().Projection(_array(features), _array(factors), rounding)
    outputs = [_array(x, True) if statistics else None for x in (pilot, found)]
    module().project(call, _array(logits, True), *outputs, _card())
    return logits, pilot, found


def _project_gradients(
    logit_gradient: Tensor | None, statistics_gradient: Tensor | None, features: Tensor, weight: Tensor, logits: Tensor,
    pilot: Tensor, statistics: Tensor, rounding: str, features_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module().set_order(ORDERS.index(Settings.order), Settings.seed)
    factors = _rounded(weight, rounding)
    given = None if logit_gradient is None else logit_gradient.float().contiguous()
    measured = statistics_gradient is not None and statistics.numel() > 0
    by_statistics = statistics_gradient.contiguous() if measured else None
    gradient = [_array(given), _array(logits), _array(statistics if measured else None), _array(by_statistics)]
    by_weight, by_features = _unwritten(weight_grad, *weight.shape), features.new_empty(0)
    if weight_grad:
        call = module().Projection(_array(features), _array(factors), rounding)
        centre = _array(pilot) if pilot.numel() else None
        module().project_weights(call, gradient, centre, _array(by_weight, True), _card())
    if features_grad:
        by_features, *strides = _empty_features(features, reads_channels_last(features))
        module().project_back(gradient, _array(factors), None, _array(by_features, True), *strides, _card())
    return by_features, by_weight.to(weight.dtype if weight_grad else torch.float32)


def _register(name: str, table: dict, implementation: Any) -> None:
    _, table[NAME] = library.define(f"{name}_{NAME}", *library.definitions[name])
    library._library.impl(f"{name}_{NAME}", lambda *args: implementation(*args[:-1]), "CPU")


_register("project_gradients", projection._project_gradients, _project_gradients)
_register("project", projection._differentiable_project, _project)
_register("normalized_hakd_loss", pixel_losses._differentiable_normalized_hakd, _normalized_hakd)
_register("hakd_loss", pixel_losses._differentiable_hakd, _hakd)
_register("segmentation_loss", pixel_losses._differentiable_segmentation, _segmentation)
_register("project_back", projected_losses._project_back, _project_back)
_register("projected_hakd_loss", projected_losses._differentiable_projected_hakd, _projected)


_really_able = projected_losses.able


def _able(num_classes: int) -> tuple[str, ...]:
    return (NAME,) if "cuda" in _really_able(num_classes) else ()


@contextlib.contextmanager
def active(order: str | None = None) -> Iterator[None]:
    """Public functions and modules run the kernels on the host, threads and blocks in an ``order``."""
    if order is not None:
        Settings.order = ORDERS[ORDERS.index(order)]
    with (
        mock.patch.object(backends, "select", lambda backend, device: backend or NAME),
        mock.patch.object(projected_losses, "able", _able),
        mock.patch.object(projection, "able", lambda: (NAME,)),
    ):
        yield


def _emulated(public: Any) -> Any:
    @functools.wraps(public)
    def call(*args: Any, order: str | None = None, **kwargs: Any) -> Any:
        with active(order):
            return public(*args, **kwargs)

    return call


hakd_loss = _emulated(functional.hakd_loss)
segmentation_loss = _emulated(functional.segmentation_loss)
projected_hakd_loss = _emulated(functional.projected_hakd_loss)
hakd_loss_of_projections = _emulated(functional.hakd_loss_of_projections)


def take_traffic() -> tuple[int, int, int, list[str]]:
    """Bytes read and written by kernels since the last call, launches, and the kernels' names."""
    read, written, launches, names, *_ = module().take_traffic()
    return read, written, launches, names.split()


def take_traffic_by_buffer() -> dict[str, tuple[int, int]]:
    """Bytes read and written since the last call, by the buffers' names."""
    return module().take_traffic()[4]


class Requests(NamedTuple):
    """What the warps of a kernel asked of memory at one instruction (accesses.h): how often, cycles of the banks of
    shared memory or sectors of global memory, and the least that so many bytes need. ``site``: in the library."""

    kernel: str
    shared: bool
    writes: bool
    site: int
    requests: int
    taken: int
    least: int


@contextlib.contextmanager
def counted_requests() -> Iterator[list[Requests]]:
    """Of the kernels that run within, afterwards."""
    found: list[Requests] = []
    module().take_requests()
    module().count_accesses(True)
    try:
        yield found
    finally:
        module().count_accesses(False)
        found += (Requests(*r) for r in module().take_requests())


def take_loads() -> dict[str, int]:
    """How often threads read since the last call, by the buffers' names."""
    return module().take_traffic()[5]
