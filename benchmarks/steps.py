"""The one set-up of every case: forward and backward on fixed inputs, by any provider, for time and for memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

import hetero_kernels
from hetero_kernels import HeteroAKDLoss, PixelProjector, functional, reference

from .cases import Case, PixelCase, ProjectedCase, ProjectionCase, WholeCase

MODES = ("fwd", "bwd", "both")
BASELINES = ("reference", "compile", "linear_cross_entropy")
FUSED = ("cpu", "cuda", "triton")
INSTRUCTION_SET = "HETERO_KERNELS_CPU_ISA"


class Step:
    """Forward and backward of a loss, apart or (called) together.

    Args:
        loss: computes the 0-dim loss from the leaves.
        leaves: tensors that get gradients, dropped before every forward.
        update: runs after every backward, e.g. an optimiser's step.
    """

    def __init__(
        self, loss: Callable[[], Tensor], leaves: Sequence[Tensor], update: Callable[[], object] | None = None
    ) -> None:
        self._loss, self.leaves, self._update = loss, list(leaves), update
        self._wait = any(leaf.is_cuda for leaf in leaves)
        self.loss: Tensor | None = None

    def release(self) -> None:
        """Drops gradients and graph of the last call."""
        self.loss = None
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> None:
        self.release()
        self.loss = self._loss()
        self._finish()

    def backward(self) -> None:
        assert self.loss is not None, "backward needs a forward before it"
        self.loss.backward()
        if self._update is not None:
            self._update()
        self._finish()

    def _finish(self) -> None:
        if self._wait:
            torch.cuda.synchronize()

    def __call__(self) -> Tensor:
        self.forward()
        self.backward()
        assert self.loss is not None
        return self.loss.detach()


def fused_backends(device: str = "cpu") -> list[str]:
    """Our backends that run for tensors on ``device`` here."""
    found = []
    for backend in FUSED:
        try:
            found.append(hetero_kernels.select_backend(backend, device))
        except (RuntimeError, ValueError):
            continue
    return found


def providers(case: Case, device: str = "cpu") -> list[str]:
    """What computes ``case`` on ``device``: eager, compiled, PyTorch's own chunked loss, our backends."""
    names = ["reference"]
    if not isinstance(case, ProjectedCase) or case.compiled:
        names.append("compile")
    if isinstance(case, ProjectedCase) and case.loss == "cross_entropy":
        names.append("linear_cross_entropy")
    return names + fused_backends(device)


def make_labels(case: Case, generator: torch.Generator | None) -> Tensor:
    """int64 [B, H, W]: blocks of 32 x 32 pixels of one class, a tenth of the pixels ignored (255)."""
    height, width = case.size
    coarse = torch.randint(0, case.num_classes, (case.batch, -(-height // 32), -(-width // 32)), generator=generator)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width].contiguous()
    ignored = torch.rand(labels.shape, generator=generator) < 0.1
    # With K > 255 the class 255 is ignored as well, by every provider alike.
    return labels.masked_fill(ignored, 255)


def pixel_step(case: PixelCase, provider: str, device: str = "cpu", seed: int = 0) -> Step:
    """Student logits require gradients, teacher logits do not."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def maps() -> Tensor:
        return (torch.randn(case.shape, generator=generator) * case.scale).to(device, dtype)

    student = maps().requires_grad_()
    teacher = maps() if case.teacher else None
    labels = make_labels(case, generator).to(device)
    options = dict(case.options)
    if provider in FUSED:
        options["backend"] = provider
    function = getattr(functional if provider in FUSED else reference, case.loss)

    def hakd() -> Tensor:
        return function(student, teacher, labels, **options)

    def segmentation() -> Tensor:
        return function(student, labels, teacher, **options)

    loss = hakd if case.loss == "hakd_loss" else segmentation
    if provider == "compile":
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    if case.threads is not None or case.instruction_set is not None:
        return _StepUnder(case, loss, [student])
    return Step(loss, [student])


def projected_step(case: ProjectedCase, provider: str, device: str = "cpu", seed: int = 0) -> Step:
    """Student features and both weights require gradients, teacher features do not."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    batch, channels, height, width = case.shape

    def maps(channels: int) -> Tensor:
        values = torch.randn(batch, channels, height, width, generator=generator)
        return values.to(device, dtype).contiguous(memory_format=layout)

    def weights(channels: int) -> Tensor:
        return (torch.randn(case.num_classes, channels, generator=generator) / channels**0.5).to(device)

    student, student_weight = maps(channels).requires_grad_(), weights(channels).requires_grad_()
    leaves = [student, student_weight]
    labels = make_labels(case, generator).to(device)
    options = dict(case.options)
    module = functional if provider in FUSED else reference
    if provider in FUSED:
        options["backend"] = provider

    if case.loss == "cross_entropy":

        def loss() -> Tensor:
            if provider == "linear_cross_entropy":
                return F.linear_cross_entropy(
                    student.permute(0, 2, 3, 1).reshape(-1, channels), student_weight, labels.reshape(-1),
                    ignore_index=255, options=torch.nn.LinearCrossEntropyOptions(),
                )  # fmt: skip
            logits = F.conv2d(student, student_weight[:, :, None, None])
            return module.segmentation_loss(logits, labels, **options)
    else:
        teacher, teacher_weight = maps(case.teacher_channels), weights(case.teacher_channels).requires_grad_()
        leaves.append(teacher_weight)

        def convolve(features: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(features.to(weight.dtype), weight[:, :, None, None])

        def loss() -> Tensor:
            if provider in FUSED:
                return functional.projected_hakd_loss(
                    student, teacher, student_weight, teacher_weight, labels, **options
                )  # fmt: skip
            # What one would write: the reference's own convolution, careful of NaN, is slower when compiled.
            return reference.hakd_loss(
                convolve(student, student_weight), convolve(teacher, teacher_weight), labels, **options
            )  # fmt: skip

    return Step(torch.compile(loss, fullgraph=True, dynamic=False) if provider == "compile" else loss, leaves)


def projection_step(case: ProjectionCase, provider: str, device: str = "cpu", seed: int = 0) -> Step:
    """Both projectors in training mode: gradients of the student's features and of all parameters for given gradients
    of what they return. Eager, and what is compiled, are torch's layers."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format

    def maps(channels: int) -> Tensor:
        values = torch.randn(case.batch, channels, *case.grid, generator=generator)
        return values.to(device).contiguous(memory_format=layout)

    features = [maps(case.student_channels).requires_grad_(), maps(case.teacher_channels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = [PixelProjector(x.shape[1], case.num_classes).to(device) for x in features]
    upstream = [maps(case.num_classes) for _ in projectors]

    def projected(projector: PixelProjector, x: Tensor) -> Tensor:
        if provider in FUSED:
            projector.backend = provider
            return projector(x)
        for layer in projector:
            x = layer(x)
        return x

    def loss() -> Tensor:
        parts = zip(projectors, features, upstream, strict=True)
        return torch.stack([(projected(projector, x) * g).sum() for projector, x, g in parts]).sum()

    if provider == "compile":
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return Step(loss, [features[0], *(parameter for p in projectors for parameter in p.parameters())])


def whole_step(case: WholeCase, provider: str, device: str = "cpu", seed: int = 0) -> Step:
    """HeteroAKDLoss in training mode: gradients of the student's features and logits and of both projectors. Eager, and
    what is compiled, are the projectors' layers as torch runs them and the reference's formulas. Fake tensors do."""

    def maps(channels: int, stride: int) -> Tensor:
        return torch.randn(case.batch, channels, case.size[0] // stride, case.size[1] // stride)

    with torch.random.fork_rng(devices=[]), torch.device(device):  # no generator: fake tensors take none
        torch.manual_seed(seed)
        module = HeteroAKDLoss(
            case.student_channels, case.teacher_channels, case.num_classes,
            backend=provider if provider in FUSED else "reference", **case.options,
        )  # fmt: skip
        features = maps(case.student_channels, case.student_strides[0]).requires_grad_()
        logits = maps(case.num_classes, case.student_strides[1]).requires_grad_()
        teacher_features = maps(case.teacher_channels, case.teacher_strides[0])
        teacher_logits = maps(case.num_classes, case.teacher_strides[1])
        labels = make_labels(case, None)

    def fused() -> Tensor:
        return module(features, teacher_features, labels, logits, teacher_logits).loss

    def plain() -> Tensor:
        projected = []
        for projector, x in ((module.student_projector, features), (module.teacher_projector, teacher_features)):
            for layer in projector:
                x = layer(x)
            projected.append(x)
        resolution = case.options.get("resolution", "label")
        loss = reference.hakd_loss(*projected, labels, proj_weight=1.0, resolution=resolution)
        return loss + reference.segmentation_loss(logits, labels, teacher_logits)

    loss = fused if provider in FUSED else plain
    if provider == "compile":
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return Step(loss, [features, logits, *module.parameters()])


def make_step(case: Case, provider: str, device: str = "cpu") -> Step:
    """Forward and backward of ``case`` by ``provider``: one of :func:`providers`."""
    known = (*BASELINES, *FUSED)
    if provider not in known:
        raise ValueError(f"provider is {provider!r}, expected one of {', '.join(map(repr, known))}")
    if isinstance(case, WholeCase):
        return whole_step(case, provider, device)
    if isinstance(case, ProjectionCase):
        return projection_step(case, provider, device)
    if isinstance(case, PixelCase):
        return pixel_step(case, provider, device)
    return projected_step(case, provider, device)


@contextmanager
def _conditions(threads: int | None, instruction_set: str | None) -> Iterator[None]:
    """Runs with so many threads and on that instruction set of the "cpu" backend; None leaves them as they are."""
    threads_before, set_before = torch.get_num_threads(), os.environ.get(INSTRUCTION_SET)
    if threads is not None:
        torch.set_num_threads(threads)
    if instruction_set is not None:
        os.environ[INSTRUCTION_SET] = instruction_set
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(threads_before)
        if instruction_set is not None:
            os.environ.pop(INSTRUCTION_SET)
            if set_before is not None:
                os.environ[INSTRUCTION_SET] = set_before


class _StepUnder(Step):
    """A step under its case's number of threads and instruction set."""

    def __init__(self, case: PixelCase, loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
        super().__init__(loss, leaves)
        self._case = case

    def forward(self) -> None:
        with _conditions(self._case.threads, self._case.instruction_set):
            super().forward()

    def backward(self) -> None:
        with _conditions(self._case.threads, self._case.instruction_set):
            super().backward()
