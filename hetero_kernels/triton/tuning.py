"""How kernels are cut into programs: blocks of classes, tiles of pixels, warps; and the search for a better cut.

The tables have an entry for each family of architectures, with its reason. HETERO_KERNELS_AUTOTUNE=1 times the
alternatives at a call's first use instead, which waits for the device.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiling:
    """How a program of a pixel loss is cut. ``blocks``: lengths of the blocks of classes; ``tile``: columns of pixels;
    ``warps``. ``looped``: over the classes, a block at a time and several rows together, some ``pixels`` in all."""

    blocks: tuple[int, ...]
    tile: int
    warps: int
    looped: bool = False
    pixels: int = 0


@dataclass(frozen=True)
class FeatureTiling:
    """How a program on features is cut. ``blocks`` of classes in the pixels' mathematics and ``products`` in matrix
    products; ``pixels`` of a tile and ``warps``; ``channels`` at a time in the projection, ``columns`` of a weight
    gradient's program."""

    blocks: tuple[int, ...]
    products: tuple[int, ...]
    pixels: int
    warps: int
    channels: int
    columns: int


@dataclass(frozen=True)
class ProductTiling:
    """How a program of the projection on its own is cut. ``blocks`` of a chunk's ``classes``; ``pixels`` of a tile and
    ``warps``; ``channels`` at a time forward, of a program backward; ``stages`` of loads that run ahead."""

    blocks: tuple[int, ...]
    classes: int
    pixels: int
    warps: int
    channels: int
    stages: int


# Integers: triton.cdiv takes a microsecond ---------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# Architectures -----------------------------------------------------------------------------------------------------


def family(device: torch.device) -> str:
    """Of architectures that the tables tell apart."""
    return "amd" if device.type == "cuda" and torch.version.hip else "nvidia"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the CPU, on which kernels are interpreted, and of "meta", a number like a GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132


# Pixel losses ------------------------------------------------------------------------------------------------------


def class_blocks(num_classes: int, exact: bool) -> tuple[int, ...]:
    """Powers of two that add up to K, 8 at most (``exact``) or to hardly more, in fewer blocks. At most 128: the
    operands of their matrix products must fit the shared memory."""
    blocks: list[int] = []
    left = num_classes
    while left > 0:
        above = next_power_of_2(left)
        if exact:
            block = min(8, above if above == left else above // 2)
        else:
            block = min(128, above if above - left <= num_classes // 16 else above // 2)
        blocks.append(block)
        left -= block
    return tuple(blocks)


# Most classes, whether blocks are exact, pixels of a tile's row, warps.
_TILES = {
    "nvidia": (
        # One thread owns a pixel, so that sums over classes stay in a thread, and no class is wasted. Twice the columns
        # spill in the slot's product.
        (32, True, 64, 2),
        # Some 20 classes of a pixel in a thread: as many as its registers hold.
        (96, False, 32, 4),
        (192, False, 32, 8),
    ),
    "amd": (
        # Matrix instructions take hundreds of registers for blocks below 16 classes. With blocks of 16, and eight
        # threads to a pixel, 120 of 512 do (gfx942, K = 19), where one thread to a pixel spills.
        (32, False, 32, 4),
        (96, False, 32, 4),
        (192, False, 32, 8),
    ),
}
# Any number of classes: what a program keeps does not grow with them. Blocks of 16 are a matrix product's least; more
# pixels would spill.
_LOOPED = {
    "nvidia": (Tiling((16,), 16, 8, looped=True, pixels=128), Tiling((16,), 16, 4, looped=True, pixels=64)),
    "amd": (Tiling((16,), 16, 4, looped=True, pixels=128), Tiling((16,), 16, 8, looped=True, pixels=128)),
}


@functools.cache
def tilings(num_classes: int, family: str) -> tuple[Tiling, ...]:
    """The table's entry, then the alternatives that a search tries."""
    for most, exact, tile, warps in _TILES[family]:
        if num_classes <= most:
            blocks = class_blocks(num_classes, exact)
            narrow, spread = Tiling(blocks, tile // 2, max(1, warps // 2)), Tiling(blocks, tile, 2 * warps)
            return Tiling(blocks, tile, warps), narrow, spread, _LOOPED[family][0]
    return _LOOPED[family]


def tilings_of(logits: torch.Tensor, *_: object) -> tuple[Tiling, ...]:
    return tilings(logits.shape[1], family(logits.device))


# Losses on features ------------------------------------------------------------------------------------------------


def product_blocks(num_classes: int, most: int = 128) -> tuple[int, ...]:
    """Powers of two from 16, a matrix product's least, to ``most`` that add up to the next multiple of 16."""
    blocks: list[int] = []
    left = 16 * cdiv(num_classes, 16)
    while left > 0:
        blocks.append(min(most, 1 << left.bit_length() - 1))
        left -= blocks[-1]
    return tuple(blocks)


@functools.cache
def feature_tilings(
    num_classes: int, pixels: int, bytes_per_feature: int, device: torch.device, family: str
) -> tuple[FeatureTiling, ...]:
    """The table's entry, then the alternatives.

    Pixels and warps are those of the pixel losses, half of them where a batch of ``pixels`` would leave multiprocessors
    without work. 64 bytes of a pixel at a time, or 16 channels: with more the projection's operands do not stay in
    registers.
    """
    of_pixels = tilings(num_classes, family)[0]
    tile, warps = of_pixels.tile, of_pixels.warps
    if num_classes <= 32 and pixels <= tile * multiprocessors(device):
        tile, warps = tile // 2, max(1, warps // 2)
    channels = 64 // bytes_per_feature if num_classes <= 32 else 16
    blocks, products = of_pixels.blocks, product_blocks(num_classes)
    return tuple(
        FeatureTiling(blocks, products, tile, warps, channels * deeper, columns)
        for deeper, columns in ((1, 32), (2, 32), (1, 64))
    )


def feature_tilings_of(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, *_: object
) -> tuple[FeatureTiling, ...]:
    size = max(student.element_size(), teacher.element_size())
    return feature_tilings(weight.shape[0], student[:, 0].numel(), size, student.device, family(student.device))


# The projection on its own -------------------------------------------------------------------------------------------

CHUNK = 160  # most classes that a program of matrix products keeps sums of


def _chunk(num_classes: int, most: int) -> tuple[tuple[int, ...], int]:
    """Blocks of classes of a chunk, and their number: chunks are even."""
    chunks = cdiv(num_classes, CHUNK)
    blocks = product_blocks(cdiv(num_classes, chunks), most)
    return blocks, sum(blocks)


@functools.cache
def project_tilings(
    num_classes: int, pixels: int, bytes_per_feature: int, device: torch.device
) -> tuple[ProductTiling, ...]:
    """The table's entry, then the alternatives. Large tiles read the weights rarely; a batch of few ``pixels`` is cut
    into halves of them, so that multiprocessors have work."""
    blocks, classes = _chunk(num_classes, 128)
    tile, warps = (128, 4) if classes <= 32 else (64, 4) if classes <= 64 else (64, 8)
    if pixels < tile * multiprocessors(device):
        tile //= 2
    channels = 64 // bytes_per_feature if classes <= 32 else 16
    return tuple(
        ProductTiling(blocks, classes, max(16, tile // narrower), warps, channels * deeper, 3)
        for narrower, deeper in ((1, 1), (1, 2), (2, 1))
    )


@functools.cache
def back_tilings(num_classes: int) -> tuple[ProductTiling, ...]:
    """The table's entry, then the alternatives: of the weights' gradient. Blocks of 128 classes would spill, and for
    many classes so would loads that run ahead."""
    blocks, classes = _chunk(num_classes, 64)
    pixels, stages = (64, 2) if classes <= 32 else (32, 1)
    cuts = ((pixels, 64), (32, 64), (pixels, 32))
    return tuple(ProductTiling(blocks, classes, tile, 8, channels, stages) for tile, channels in cuts)


def project_tilings_of(features: torch.Tensor, weight: torch.Tensor, *_: object) -> tuple[ProductTiling, ...]:
    return project_tilings(weight.shape[0], features[:, 0].numel(), features.element_size(), features.device)


def back_tilings_of(
    by_logits: object, by_statistics: object, features: torch.Tensor, weight: torch.Tensor, *_: object
) -> tuple[ProductTiling, ...]:
    return back_tilings(weight.shape[0])


# Search ------------------------------------------------------------------------------------------------------------

Choice = TypeVar("Choice")
Result = TypeVar("Result")
_found: dict[Hashable, object] = {}


def asked_to_search() -> bool:
    return os.environ.get("HETERO_KERNELS_AUTOTUNE") == "1"


def searching(device: torch.device) -> bool:
    if not asked_to_search():
        return False
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()  # a capture must not wait


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):  # do_bench times the current one
            return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _described(argument: Any) -> Hashable:
    return (argument.shape, argument.dtype) if isinstance(argument, torch.Tensor) else argument


def tuned(choices: Callable[..., Sequence[Choice]]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Gives a function of (choice, tensor, ...) its choice: the first of ``choices(tensor, ...)`` or, under
    HETERO_KERNELS_AUTOTUNE=1, the one that is fastest for arguments of these shapes: all are timed when they are first
    met. Every choice gives the same result to rounding."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(*arguments: object) -> Result:
            offered = choices(*arguments)
            if not asked_to_search():
                return function(offered[0], *arguments)
            device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
            if not searching(device):
                return function(offered[0], *arguments)
            key = (function.__name__, str(device), *map(_described, arguments))
            if key not in _found:
                _found[key] = _fastest(key, offered, lambda choice: function(choice, *arguments), device)
            return function(_found[key], *arguments)

        return run

    return decorate


def _fastest(key: Hashable, offered: Sequence[Choice], run: Callable[[Choice], object], device: torch.device) -> Choice:
    times: dict[Choice, float] = {}
    for choice in offered:
        try:
            run(choice)  # compiles
            times[choice] = _milliseconds(functools.partial(run, choice), device)
        except triton.runtime.errors.OutOfResources:
            times[choice] = math.inf
    logger.info("%s: %s", key, ", ".join(f"{choice} {t:.3f} ms" for choice, t in times.items()))
    return min(offered, key=times.__getitem__)
