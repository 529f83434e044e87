"""From tensors to launches: how many programs, which blocks, what is allocated.

Nothing here waits for the device: scalars come on the CPU, divisors stay where they are. All memory is allocated by
torch on the current stream, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import triton
from torch import Tensor

from . import reduction as kernels
from .features import Features
from .tile import Grid, Labels, Network, Upstream
from .tuning import Tiling

# Numbers of a call ------------------------------------------------------------------------------------------------


def bounded_limit(temperature: float) -> float:
    """Largest |z| that the bounded mathematics takes: over a thousand classes its largest product is
    K^2 e^{2z} e^{z/T}, its largest quotient K e^{2z/T}. None below T = 0.05, where e^z of a class that is ``OFF`` would
    not be nothing."""
    return min(24.0, 70.0 / (2.0 + 1.0 / temperature), 38.0 * temperature) if temperature >= 0.05 else -1.0


def power_of(temperature: float) -> int:
    """T where e^z is a cheap power of e^{z / T}, else 0."""
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


# The loss grid ---------------------------------------------------------------------------------------------------


def _neighbours(coarse: int, fine: int, align: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper coarse neighbours of every pixel of an axis, as tile.py computes them."""
    p, q, d = (coarse - 1, 0, max(fine - 1, 1)) if align else (2 * coarse, coarse - fine, 2 * fine)
    lower = np.maximum(np.arange(fine, dtype=np.int64) * p + q, 0) // d
    return lower, np.minimum(lower + 1, coarse - 1)


@functools.lru_cache(maxsize=256)
def _span(coarse: int, fine: int, align: bool, tile: int) -> tuple[int, int]:
    """Most coarse columns that a tile reaches, and most tiles that reach a coarse column."""
    lower, upper = _neighbours(coarse, fine, align)
    first = np.arange(0, fine, tile)
    last = np.minimum(first + tile, fine) - 1
    span = int((upper[last] - lower[first]).max()) + 1
    edges = np.concatenate([np.searchsorted(lower, np.arange(coarse)), [fine]])  # first pixel of every coarse column
    ends = np.append(edges[2:], fine)
    starts = np.append(edges[0], edges[:-2])[:coarse]
    reached = ends[:coarse] - 1
    tiles = np.maximum(reached // tile - starts // tile + 1, 1)
    return span, int(tiles.max())


@functools.lru_cache(maxsize=256)
def _tallest_band(coarse: int, fine: int, align: bool) -> int:
    lower, _ = _neighbours(coarse, fine, align)
    return int(np.bincount(lower).max())


ROWS = 16  # most rows of a program: enough to share a band's interpolation, few enough to fill a GPU


class PixelGrid(Protocol):
    """A loss grid [batch, height, width], however it is divided into programs."""

    @property
    def batch(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def programs(self) -> int: ...
    def argument(self) -> Grid: ...


class LossGrid:
    """The loss grid of a call, divided into tiles of bands."""

    def __init__(self, batch: int, tiling: Tiling, size: tuple[int, int], heights: tuple[int, int], align: bool):
        height, width = size
        self.batch, self.height, self.width, self.align = batch, height, width, align
        self.same = heights[0] == heights[1]
        self.bands = heights[0] if self.same else heights[0] + heights[1] - 1
        tallest = min(_tallest_band(h, height, align) for h in heights)
        self.tiling = tiling
        self.rows = ROWS
        if tiling.looped:  # a program's rows are a block too: as many as most bands have
            self.rows = min(ROWS, triton.next_power_of_2(triton.cdiv(height, max(self.bands, 1))))
            self.tiling = replace(tiling, tile=max(tiling.tile, tiling.pixels // self.rows))
        self.splits = triton.cdiv(tallest, self.rows)
        self.tiles = triton.cdiv(width, self.tiling.tile)
        self.heights = heights
        self.programs = batch * self.bands * self.splits * self.tiles

    def argument(self) -> Grid:
        return Grid(self.height, self.width, *self.heights, self.bands, self.splits, self.tiles)

    def options(self) -> dict[str, Any]:
        return {"TILE": self.tiling.tile, "ALIGN": self.align, "SAME": self.same}

    def blocks(self) -> dict[str, Any]:
        """The division of the main launch."""
        return {"BLOCKS": self.tiling.blocks, "ROWS": self.rows, "num_warps": self.tiling.warps, **self.options()}


@dataclass(frozen=True)
class FeatureGrid:
    """The loss grid of a call, divided into tiles of pixels."""

    batch: int
    height: int
    width: int
    pixels: int

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.height * self.width, self.pixels)

    @property
    def programs(self) -> int:
        return self.batch * self.tiles

    def argument(self) -> Grid:
        return Grid(self.height, self.width, self.height, self.height, self.height, 1, self.tiles)


def rows_follow(features: Tensor) -> bool:
    """Whether an image's rows follow each other without gaps."""
    _, _, height, width = features.shape
    return height == 1 or width == 1 or features.stride(2) == width * features.stride(3)


def feature_argument(
    features: Tensor, weight: Tensor, bias: Tensor, logits: Tensor, partial: Tensor, pilot: Tensor | None = None
) -> Features:
    """The kernels' view of a network's projection; see :class:`Features`."""
    b, c, h, w = features.stride()
    if features.shape[3] == 1:  # the next pixel is in the next row
        w = h
    by_class, by_channel = weight.stride()
    channels = features.shape[1]
    return Features(features, channels, b, c, h, w, weight, by_class, by_channel, bias, logits, partial, pilot)


class Normalization(NamedTuple):
    """What raw logits mean: ``scale z + shift`` ([K] each), then ReLU if ``relu``."""

    scale: Tensor
    shift: Tensor
    relu: bool


class NetworkPlan:
    """A network on a loss grid: its kernel argument, and its gradient on the way."""

    def __init__(self, logits: Tensor, grid: LossGrid, wanted: bool, normalization: Normalization | None = None):
        self.logits, self.wanted, self.normalization = logits, wanted, normalization
        _, classes, height, width = logits.shape
        if max(2 * height * grid.height, 2 * width * grid.width) >= 2**31:
            raise ValueError(
                f"logits of {height} x {width} on a loss grid of {grid.height} x {grid.width} pixels are too large for "
                "the Triton kernels, whose positions are 32-bit numbers"
            )
        self.direct = (height, width) == (grid.height, grid.width)
        self.span, self.reach = (1, 1) if self.direct else _span(width, grid.width, grid.align, grid.tiling.tile)
        shape = logits.shape if wanted else (0,)
        self.gradient = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self.slots = self.gradient
        if wanted and not self.direct:
            self.slots = self.gradient.new_empty(grid.programs * 2 * classes * self.span)
        # Programs of the last launch: coarse rows by blocks of classes and columns, or a flat range.
        pieces = logits.shape[0] * height * triton.cdiv(width, FINISH_COLUMNS)
        if not wanted:
            self.programs = 0
        elif self.direct and normalization is None:
            self.programs = triton.cdiv(logits.numel(), FINISH_ROWS * FINISH_COLUMNS)
        else:
            self.programs = pieces * triton.cdiv(classes, FINISH_ROWS)
        # Of scale's and shift's gradients, and those.
        measured = wanted and normalization is not None
        self.parts = self.gradient.new_empty((pieces, 2, classes) if measured else (0,))
        self.sums = self.gradient.new_empty((2, classes) if measured else (0,))

    @property
    def span_block(self) -> int:
        return min(32, max(16, triton.next_power_of_2(self.span)))

    def argument(self) -> Network:
        height, width = self.logits.shape[2:]
        b, c, h, w = self.logits.stride()
        means: tuple[Any, ...] = (None,) * 4
        if self.normalization is not None:
            scale, shift, relu = self.normalization
            means = (scale.contiguous(), shift.contiguous(), 0.0 if relu else None, self.parts)
        return Network(self.logits, self.slots, height, width, b, c, h, w, self.span, *means)

    def finishing_programs(self, deferred: bool) -> int:
        """Of the last launch: a gradient that is in its place already needs none for its own sake."""
        return self.programs if deferred or not self.direct or self.normalization is not None else 0


FINISH_ROWS, FINISH_COLUMNS = 8, 64
SUM_PARTS, SUM_COLUMNS = 128, 16


# What comes in ---------------------------------------------------------------------------------------------------


def label_argument(labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int) -> tuple[Labels, bool]:
    """The labels' argument, and whether they must be sampled to reach the loss grid.

    Raises RuntimeError for a wrong label on the CPU; on a GPU, where that would have to wait for the device, the
    kernels make the loss NaN.
    """
    height, width = labels.shape[1:]
    scales = [float(np.float32(n) / np.float32(max(m, 1))) for n, m in zip((height, width), size, strict=True)]
    sampled = (height, width) != size
    if labels.device.type == "cpu":
        rows, columns = (
            (torch.arange(n, dtype=torch.float32, device="cpu") * s).long().clamp(max=m - 1)
            if sampled
            else torch.arange(n, device="cpu")
            for n, s, m in zip(size, scales, (height, width), strict=True)
        )
        used = labels[:, rows[:, None], columns].long()
        wrong = (used != ignore_index) & ((used < 0) | (used >= num_classes))
        if wrong.any():
            b, y, x = wrong.nonzero()[0].tolist()
            raise RuntimeError(
                f"labels[{b}, {int(rows[y])}, {int(columns[x])}] is {int(used[b, y, x])}, expected a class in "
                f"[0, {num_classes}) or ignore_index={ignore_index}"
            )
    b, h, w = labels.stride()
    return Labels(labels, height, width, b, h, w, scales[0], scales[1], ignore_index), sampled


def upstream_argument(upstream: Tensor | None, nothing: Tensor) -> Upstream:
    return Upstream(nothing, 0, 0, 0) if upstream is None else Upstream(upstream, *upstream.stride())


# Divisors ---------------------------------------------------------------------------------------------------------


@dataclass
class TermPlan:
    """One of a loss's two terms. ``mode``: what divides its sum, "count" (of valid pixels), "given" (``divisor``: the
    sum of its ``parts`` numbers) or "one"."""

    weight: float
    share: float
    mode: str
    divisor: Tensor
    parts: int = 0

    @property
    def block(self) -> int:
        return triton.next_power_of_2(self.parts) if self.mode == "given" else 0

    def argument(self) -> kernels.Term:
        return kernels.Term(self.weight, self.share, self.divisor, self.parts)


def plan_term(
    weight: float, reduction: str, normalizer: Tensor | None, nothing: Tensor, share: float | None = None
) -> TermPlan:
    """``share``: a divisor known beforehand, as its inverse, in place of the number of valid pixels."""
    if reduction != "mean":
        return TermPlan(weight, 1.0, "one", nothing)
    if normalizer is not None:
        return TermPlan(weight, 1.0, "given", normalizer.to(nothing.device), 1)
    if share is not None:
        return TermPlan(weight, share, "one", nothing)
    return TermPlan(weight, 1.0, "count", nothing)


def differ(terms: tuple[TermPlan, TermPlan]) -> bool:
    """Whether the gradients of two terms have different divisors, one being the number of valid pixels."""
    modes = {t.mode for t in terms if t.weight != 0}
    return len(modes) > 1 and "count" in modes


def count_early(
    terms: tuple[TermPlan, TermPlan], grid: PixelGrid, labels: Labels, sampled: bool, num_classes: int,
    class_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Puts "count" divisors into numbers before the main launch: for terms whose gradients have different divisors."""
    rows = grid.batch * grid.height
    programs = min(rows, 1024)
    parts = torch.empty(2, programs, dtype=torch.float32, device=labels.data.device)
    weight = parts if class_weight is None else class_weight
    kernels.divisors_kernel[(programs,)](
        labels, grid.argument(), weight, parts, rows, num_classes,
        BLOCK=min(1024, max(128, triton.next_power_of_2(grid.width))), SAMPLED=sampled,
        HAS_WEIGHT=class_weight is not None, num_warps=4,
    )  # fmt: skip
    for i, term in enumerate(terms):
        if term.mode == "count":
            # The first term's divisor is the sum of the class weights where there are any.
            row = 1 if i == 0 and class_weight is not None else 0
            term.mode, term.divisor, term.parts = "given", parts[row], programs


# Launching --------------------------------------------------------------------------------------------------------


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision(tensor: Tensor) -> str:
    """How the adjoint's matrix product keeps float32: three tf32 products, or AMD's own float32 instructions."""
    return "ieee" if torch.version.hip or tensor.device.type == "cpu" else "tf32x3"


def product_precision(tensor: Tensor) -> str:
    """How factors are multiplied, see ``matrix_product``: with tf32 where torch itself may do so (by
    torch.set_float32_matmul_precision or torch.backends.cuda.matmul.fp32_precision); AMD's matrix cores take float32.
    """
    if tensor.device.type == "cpu":
        return "interpreted"
    if torch.version.hip:
        return "ieee"
    # torch.get_float32_matmul_precision() raises once this has been set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


class Output:
    """What a loss returns: its value and its terms, 0-dim or maps, and what the main launch leaves for the last."""

    def __init__(self, grid: PixelGrid, reduction: str, device: torch.device):
        self.maps = reduction == "none"
        shape = (grid.batch, grid.height, grid.width) if self.maps else ()
        self.loss, self.first, self.second = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
        self.partial = self.first.new_empty(max(grid.programs, 1), 2)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of no pixel at all."""
        return self.loss.zero_(), self.first.zero_(), self.second.zero_()

    def values(self, terms: tuple[TermPlan, TermPlan]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and terms, after the last launch."""
        if self.maps:
            self.loss = terms[0].weight * self.first + terms[1].weight * self.second
        return self.loss, self.first, self.second

    def argument(self) -> kernels.Output:
        return kernels.Output(self.partial, self.count, self.first, self.second)


def finish(
    student: NetworkPlan,
    teacher: NetworkPlan,
    grid: LossGrid,
    terms: tuple[TermPlan, TermPlan],
    output: Output,
    num_classes: int,
) -> None:
    """The last launch: gradients of both networks, and the loss unless it is a map. For raw logits one more each, of
    the sums over pixels that are scale's and shift's gradients."""
    deferred = any(t.mode == "count" and t.weight != 0 for t in terms)
    students, teachers = student.finishing_programs(deferred), teacher.finishing_programs(deferred)
    programs = students + teachers + (not output.maps)
    if programs == 0:
        return
    kernels.finish_kernel[(programs,)](
        student.argument(), teacher.argument(), student.gradient, teacher.gradient, grid.argument(),
        output.partial, output.count, tuple(t.argument() for t in terms), output.loss, output.first, output.second,
        num_classes, grid.programs, students, teachers, student.reach, teacher.reach,
        student.gradient.numel(), teacher.gradient.numel(),
        MODES=tuple(t.mode for t in terms), PARTS=tuple(t.block for t in terms), STUDENT=students > 0,
        TEACHER=teachers > 0, STUDENT_DIRECT=student.direct, TEACHER_DIRECT=teacher.direct, DEFERRED=deferred,
        LOSS=not output.maps, ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS, num_warps=4, **grid.options(),
    )  # fmt: skip
    for network in (student, teacher):
        if columns := network.sums.numel():
            kernels.sum_parts_kernel[(triton.cdiv(columns, SUM_COLUMNS),)](
                network.parts, network.sums, len(network.parts), columns, PARTS=SUM_PARTS, COLUMNS=SUM_COLUMNS,
                num_warps=4,
            )  # fmt: skip
