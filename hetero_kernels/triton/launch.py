"""From tensors to launches: how many programs, which blocks, what is allocated.

Nothing here waits for the device: scalars come on the CPU, divisors stay where they are. All memory is allocated by
torch on the current stream, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .features import Features, Flat
from .tile import Grid
from .tuning import Tiling, cdiv, next_power_of_2

# Numbers of a call ------------------------------------------------------------------------------------------------

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]  # and strides: of a plan's key


def shape_of(tensor: Tensor) -> Shape:
    return tensor.shape, tensor.stride(), tensor.dtype


def hidden(*numbers: int) -> tuple[int, ...]:
    """Numbers >= 0 as no kernel is specialised for them: never 1, never a multiple of 16. See tile.py."""
    return tuple(~(2 * n) for n in numbers)


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


class LossGrid:
    """The loss grid of a call, divided into tiles of bands."""

    def __init__(self, batch: int, tiling: Tiling, size: tuple[int, int], heights: tuple[int, int], align: bool):
        height, width = size
        self.height, self.width, self.align = height, width, align
        self.same = heights[0] == heights[1]
        bands = heights[0] if self.same else heights[0] + heights[1] - 1
        tallest = min(_tallest_band(h, height, align) for h in heights)
        self.tiling = tiling
        self.rows = ROWS
        if tiling.looped:  # a program's rows are a block too: as many as most bands have
            self.rows = min(ROWS, next_power_of_2(cdiv(height, max(bands, 1))))
            self.tiling = replace(tiling, tile=max(tiling.tile, tiling.pixels // self.rows))
        splits, tiles = cdiv(tallest, self.rows), cdiv(width, self.tiling.tile)
        self.parts = bands * splits * tiles  # programs of an image
        self.programs = batch * self.parts
        self.argument = Grid(*hidden(height, width, *heights, bands, splits, tiles))

    def reached(self, width: int) -> tuple[int, int]:
        """Most columns of a network that is ``width`` wide that a tile reaches, and most tiles that reach a column."""
        return _span(width, self.width, self.align, self.tiling.tile)

    def options(self) -> dict[str, Any]:
        return {"TILE": self.tiling.tile, "ALIGN": self.align, "SAME": self.same}

    def blocks(self) -> dict[str, Any]:
        """The division of the main launch."""
        return {"BLOCKS": self.tiling.blocks, "ROWS": self.rows, "num_warps": self.tiling.warps, **self.options()}


class FeatureGrid:
    """The loss grid of a call, divided into tiles of pixels."""

    def __init__(self, batch: int, height: int, width: int, pixels: int) -> None:
        tiles = cdiv(height * width, pixels)
        self.programs = batch * tiles
        self.argument = Flat(*hidden(height, width, height * width, tiles))
        self.multiple = 16 if height * width % 16 == 0 else 1  # what an image's pixels are a multiple of


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
    if rows_follow(features):  # which nobody asks for then, and is another number for every crop
        h = 0
    by_class, by_channel = weight.stride()
    channels = features.shape[1]
    return Features(features, channels, b, c, h, w, weight, by_class, by_channel, bias, logits, partial, pilot)


class Normalization(NamedTuple):
    """What raw logits mean: ``scale z + shift`` ([K] each), then ReLU if ``relu``."""

    scale: Tensor
    shift: Tensor
    relu: bool


# Launching --------------------------------------------------------------------------------------------------------


class Launch:
    """A kernel, its grid and what it is compiled for.

    Triton looks at every argument of every launch to find the kernel that was compiled for it, which takes longer than
    starting it. Where numbers, dtypes and options are those of a plan, only the alignment of memory can differ:
    ``aligned`` says that all begins at multiples of 16 bytes, and such launches go straight to what the first of them
    compiled.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self._kernel, self._grid, self._constants = kernel, (*grid, 1, 1)[:3], constants
        self._start: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, aligned: bool, *arguments: Any) -> None:
        if self._grid[0] == 0:
            return
        if aligned and self._start is not None:
            self._start(*arguments, *self._rest)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        if aligned and isinstance(compiled, CompiledKernel):
            self._rest = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._start = compiled[self._grid]  # last: plans are shared by threads


def aligned(*tensors: Tensor | None) -> bool:
    """Whether each begins at a multiple of 16 bytes."""
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % 16:
            return False
    return True


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision(device: torch.device) -> str:
    """How the adjoint's matrix product keeps float32: three tf32 products, or AMD's own float32 instructions."""
    return "ieee" if torch.version.hip or device.type == "cpu" else "tf32x3"


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
