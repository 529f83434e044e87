"""What of a loss's call its shapes and options decide: once for all calls that have these.

Two launches, of which the second finishes; a third before them counts the divisors where the gradients need them at
once: where those of two terms have different ones, and where a network has the loss grid, whose gradient would else be
read and written again for its divisor's sake alone (that of raw logits is read and written again in any case).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reduction as kernels
from .launch import Launch, LossGrid, Normalization, Shape, hidden
from .tile import Labels, Network, Upstream
from .tuning import Tiling, cdiv

FINISH_ROWS, FINISH_COLUMNS = 8, 64
LOSS_BLOCK = 512  # of twice as many some spill
SUM_PARTS, SUM_COLUMNS = 128, 16
COUNT_PARTS, COUNT_BLOCK = 256, 1024


class NetworkPlan:
    """A network on a loss grid. ``raw``: whether its logits come with a normalization."""

    def __init__(self, shape: Shape, grid: LossGrid, wanted: bool, raw: bool) -> None:
        (batch, classes, height, width), (b, c, h, w), _ = shape
        if max(2 * height * grid.height, 2 * width * grid.width) >= 2**31:
            raise ValueError(
                f"logits of {height} x {width} on a loss grid of {grid.height} x {grid.width} pixels are too large for "
                "the Triton kernels, whose positions are 32-bit numbers"
            )
        self.wanted = wanted
        self.direct = (height, width) == (grid.height, grid.width)
        self.span, self.reach = (1, 1) if self.direct else grid.reached(width)
        self.shape = (batch, classes, height, width) if wanted else (0,)
        self.slots = 0 if self.direct or not wanted else grid.programs * 2 * classes * self.span
        # Programs of the last launch: coarse rows by blocks of columns and of classes.
        pieces = batch * height * cdiv(width, FINISH_COLUMNS)
        self.programs = pieces * cdiv(classes, FINISH_ROWS) if wanted and (raw or not self.direct) else 0
        # Of scale's and shift's gradients, and those.
        self.parts, self.columns = (pieces, 2 * classes) if wanted and raw else (0, 0)
        self.sums = (2, classes) if self.columns else (0,)
        self._numbers = (*hidden(height, width, b, c, h), w, *hidden(self.span))

    @property
    def span_block(self) -> int:
        return 16 if self.span <= 16 else 32

    def argument(self, logits: Tensor, gradient: Tensor, normalization: Normalization | None, parts: Tensor) -> Network:
        """``gradient``: slots, or the gradient itself where the network has the loss grid."""
        means: tuple[Any, ...] = (None, None, None, None)
        if normalization is not None:
            scale, shift, relu = normalization
            means = (scale, shift, 0.0 if relu else None, parts)
        return Network._make((logits, gradient, *self._numbers, *means))


class TermsPlan:
    """A loss's two terms: what divides each one's sum, and when that is known.

    Args:
        labels: their shape. batch, size: of the loss grid.
        weights: whether each term has one. given: whether each term's divisor is. share: the first one's known
            beforehand, as its inverse.
        gradients: whether the gradients' divisors must be one, "count" or not. in_place: whether gradients are not
            touched after the main launch. weighted: whether the first divisor is the sum of the pixels' class weights.
    """

    def __init__(
        self, labels: Shape, batch: int, size: tuple[int, int], reduction: str, weights: tuple[bool, bool],
        given: tuple[bool, bool], *, gradients: bool, in_place: bool, weighted: bool = False,
        share: float | None = None,
    ) -> None:  # fmt: skip
        modes = [divisor_of(reduction, term, known) for term, known in zip(given, (share, None), strict=True)]
        used = {mode for mode, weight in zip(modes, weights, strict=True) if weight}
        differ = gradients and len(used) > 1 and "count" in used
        self.early = "count" in modes and (differ or in_place or (weighted and modes[0] == "count"))
        # Of the numbers whose sum is each divisor: one, or what is counted early.
        self.blocks = tuple({"given": 1, "count": COUNT_PARTS if self.early else 0}.get(mode, 0) for mode in modes)
        self.modes = tuple("given" if self.early and mode == "count" else mode for mode in modes)
        self.deferred = any(m == "count" and weight for m, weight in zip(self.modes, weights, strict=True))
        self._grid = (batch, *size)
        self.sampled, self._labels = label_numbers(labels, size)
        self.parts = min(batch * cdiv(size[0] * size[1], COUNT_BLOCK), COUNT_PARTS)
        self.floats = 2 * COUNT_PARTS if self.early else 0
        known = share if share is not None and reduction == "mean" and not given[0] else 1.0
        numbers = {1: hidden(1), COUNT_PARTS: hidden(self.parts)}
        self._terms = tuple(
            (factor, block, *numbers.get(block, hidden(0)))
            for factor, block in zip((known, 1.0), self.blocks, strict=True)
        )
        self._launch = Launch(
            kernels.divisors_kernel, (self.parts,), BLOCK=COUNT_BLOCK, PARTS=COUNT_PARTS, SAMPLED=self.sampled,
            HAS_WEIGHT=weighted, num_warps=4,
        )  # fmt: skip

    def labels(self, labels: Tensor, ignore_index: int) -> Labels:
        return Labels._make((labels, *self._labels, ignore_index))

    def counter(self, like: Tensor) -> Tensor | None:
        """For the number of valid pixels, where the main launch counts them."""
        return torch.zeros(1, dtype=torch.int64, device=like.device) if "count" in self.modes else None

    def arguments(
        self, weights: tuple[float, float], normalizers: tuple[Tensor | None, Tensor | None], counts: Tensor
    ) -> tuple[kernels.Term, kernels.Term]:
        """``counts``: memory of ``floats``, for what is counted early."""
        first, second = (
            kernels.Term(weight, factor, None if block == 0 else normalizer if block == 1 else counts, parts)
            for weight, normalizer, (factor, block, parts) in zip(weights, normalizers, self._terms, strict=True)
        )
        return first, second

    def count(
        self, aligned: bool, labels: Labels, counts: Tensor, classes: int, class_weight: Tensor | None = None
    ) -> None:
        """The divisors, where that is early."""
        if self.early:
            self._launch(aligned, labels, class_weight, counts, *self._grid, classes)


class Buffers(NamedTuple):
    """A call's memory: what it returns, and pieces of its workspace."""

    loss: Tensor
    first: Tensor
    second: Tensor
    counter: Tensor | None
    student: Tensor  # gradients
    teacher: Tensor
    partial: Tensor
    counts: Tensor
    slots: tuple[Tensor, Tensor]
    parts: tuple[Tensor, Tensor]


class PixelPlan:
    """A pixel loss's grid, networks, terms and launches.

    Args:
        student, teacher, labels: their shapes. size: of the loss grid.
        wanted, raw: of student and teacher, see :class:`NetworkPlan`.
        terms: ``weights``, ``given``, ``weighted`` and ``share`` of :class:`TermsPlan`.
    """

    main: Launch

    def __init__(
        self, tiling: Tiling, student: Shape, teacher: Shape, labels: Shape, size: tuple[int, int], align: bool,
        wanted: tuple[bool, bool], raw: tuple[bool, bool], reduction: str, **terms: Any,
    ) -> None:  # fmt: skip
        batch, self.classes = student[0][:2]
        self.grid = LossGrid(batch, tiling, size, (student[0][2], teacher[0][2]), align)
        self.student = NetworkPlan(student, self.grid, wanted[0], raw[0])
        self.teacher = NetworkPlan(teacher, self.grid, wanted[1], raw[1])
        self.networks = (self.student, self.teacher)
        self.maps = reduction == "none"
        self._output = (batch, *size) if self.maps else ()
        in_place = any(n.direct and n.wanted and not r for n, r in zip(self.networks, raw, strict=True))
        self.terms = TermsPlan(
            labels, batch, size, reduction, gradients=any(wanted), in_place=in_place, **terms
        )  # fmt: skip
        floats = (2 * self.grid.programs, self.terms.floats, self.student.slots, self.teacher.slots,
                  *(network.parts * network.columns for network in self.networks))  # fmt: skip
        ends = list(itertools.accumulate(4 * cdiv(n, 4) for n in floats))  # each begins at a multiple of 16 bytes
        self._floats = ends[-1]
        self._pieces = [slice(*ends) for ends in zip((0, *ends), ends, strict=False)]
        self._finish = Launch(
            kernels.finish_kernel, (self.student.programs + self.teacher.programs + (not self.maps),),
            MODES=self.terms.modes, PARTS=self.terms.blocks, STUDENT=self.student.programs > 0,
            TEACHER=self.teacher.programs > 0, STUDENT_DIRECT=self.student.direct, TEACHER_DIRECT=self.teacher.direct,
            DEFERRED=self.terms.deferred, LOSS=not self.maps, **self.grid.options(), ROWS=FINISH_ROWS,
            COLUMNS=FINISH_COLUMNS, BLOCK=LOSS_BLOCK, num_warps=4,
        )  # fmt: skip
        self._raw = any(raw)
        self._sums = [
            Launch(
                kernels.sum_parts_kernel, (cdiv(network.columns, SUM_COLUMNS),), PARTS=SUM_PARTS, COLUMNS=SUM_COLUMNS,
                num_warps=4,
            )
            for network in self.networks
        ]  # fmt: skip

    def allocate(self, like: Tensor) -> Buffers:
        workspace = torch.empty(self._floats, dtype=torch.float32, device=like.device)
        # A view takes longer than memory of its own: none of what is empty.
        partial, counts, student, teacher, *parts = (
            workspace[piece] if 0 < piece.start < piece.stop else workspace for piece in self._pieces
        )
        loss = workspace.new_empty(self._output)
        return Buffers(
            loss, torch.empty_like(loss), torch.empty_like(loss), self.terms.counter(like),
            workspace.new_empty(self.student.shape), workspace.new_empty(self.teacher.shape), partial, counts,
            (student, teacher), (parts[0], parts[1]),
        )  # fmt: skip

    def arguments(
        self, logits: tuple[Tensor, Tensor], buffers: Buffers,
        normalizations: tuple[Normalization | None, Normalization | None] = (None, None),
    ) -> tuple[Network, Network]:  # fmt: skip
        """Of both networks."""
        student = buffers.student if self.student.direct else buffers.slots[0]
        teacher = buffers.teacher if self.teacher.direct else buffers.slots[1]
        return (
            self.student.argument(logits[0], student, normalizations[0], buffers.parts[0]),
            self.teacher.argument(logits[1], teacher, normalizations[1], buffers.parts[1]),
        )

    def output(self, buffers: Buffers) -> kernels.Output:
        first, second = (buffers.first, buffers.second) if self.maps else (None, None)
        return kernels.Output(buffers.partial, buffers.counter, first, second)

    def finish(
        self, aligned: bool, networks: tuple[Network, Network], terms: tuple[kernels.Term, kernels.Term],
        buffers: Buffers,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The last launch: gradients of both networks, and the loss unless it is a map. For raw logits one more each,
        of the sums over pixels that are scale's and shift's gradients.

        Returns loss and terms, both gradients and, where any logits are raw, those sums.
        """
        loss, first, second = buffers[:3]
        self._finish(
            aligned, *networks, buffers.student, buffers.teacher, self.grid.argument, buffers.partial, buffers.counter,
            terms, loss, first, second, self.classes, self.grid.programs, self.student.programs, self.student.reach,
            self.teacher.reach,
        )  # fmt: skip
        if self.maps:
            loss = terms[0].weight * first + terms[1].weight * second
        if not self._raw:
            return loss, first, second, buffers.student, buffers.teacher
        sums = [loss.new_empty(network.sums) for network in self.networks]
        for network, parts, out, launch in zip(self.networks, buffers.parts, sums, self._sums, strict=True):
            launch(aligned, parts, out, network.parts, network.columns)
        return loss, first, second, buffers.student, buffers.teacher, *sums

    def nothing(self, buffers: Buffers) -> tuple[Tensor, ...]:
        """What :meth:`finish` returns, of no pixel at all."""
        sums = [buffers.loss.new_zeros(network.sums) for network in self.networks if self._raw]
        return *(t.zero_() for t in (*buffers[:3], buffers.student, buffers.teacher)), *sums


def divisor_of(reduction: str, given: bool, known: float | None) -> str:
    """What divides a term's sum: "count" (of valid pixels), "given" or "one"."""
    if reduction != "mean":
        return "one"
    return "given" if given else "count" if known is None else "one"


@functools.lru_cache(maxsize=256)
def label_numbers(labels: Shape, size: tuple[int, int]) -> tuple[bool, tuple[Any, ...]]:
    """Whether labels must be sampled to reach a loss grid, and all of their argument but the tensor and the ignored."""
    (_, height, width), (b, h, w), _ = labels
    scales = [float(np.float32(n) / np.float32(max(m, 1))) for n, m in zip((height, width), size, strict=True)]
    return (height, width) != size, (*hidden(height, width, b, h), w, *scales)


def check_labels(labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int) -> None:
    """Raises RuntimeError for a wrong label on the CPU; on a GPU, where that would have to wait for the device, the
    kernels make the loss NaN."""
    if labels.device.type != "cpu":
        return
    height, width = labels.shape[1:]
    sampled, (*_, by_row, by_column) = label_numbers((labels.shape, labels.stride(), labels.dtype), size)
    rows, columns = (
        (torch.arange(n, dtype=torch.float32, device="cpu") * s).long().clamp(max=m - 1)
        if sampled
        else torch.arange(n, device="cpu")
        for n, s, m in zip(size, (by_row, by_column), (height, width), strict=True)
    )
    used = labels[:, rows[:, None], columns].long()
    wrong = (used != ignore_index) & ((used < 0) | (used >= num_classes))
    if wrong.any():
        b, y, x = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"labels[{b}, {int(rows[y])}, {int(columns[x])}] is {int(used[b, y, x])}, expected a class in "
            f"[0, {num_classes}) or ignore_index={ignore_index}"
        )


def upstream_argument(upstream: Tensor | None) -> Upstream:
    if upstream is None:
        return NO_UPSTREAM
    b, h, w = upstream.stride()
    return Upstream._make((upstream, *hidden(b, h), w))


NO_UPSTREAM = Upstream._make((None, *hidden(0, 0), 0))
