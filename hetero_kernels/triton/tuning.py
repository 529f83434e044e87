"""How kernels are cut into programs: blocks of classes, tiles of pixels, warps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .launch import tiling


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


def product_blocks(num_classes: int) -> tuple[int, ...]:
    """Powers of two from 16, a matrix product's least, to 128 that add up to the next multiple of 16."""
    blocks: list[int] = []
    left = 16 * triton.cdiv(num_classes, 16)
    while left > 0:
        blocks.append(min(128, 1 << left.bit_length() - 1))
        left -= blocks[-1]
    return tuple(blocks)


@functools.cache
def feature_tiling(num_classes: int, pixels: int, bytes_per_feature: int, device: torch.device) -> FeatureTiling:
    """Pixels and warps are those of ``tiling``, half of them where a batch of ``pixels`` would leave multiprocessors
    without work. 64 bytes of a pixel at a time, or 16 channels: with more the projection's operands do not stay in
    registers."""
    of_pixels = tiling(num_classes)
    tile, warps = of_pixels.tile, of_pixels.warps
    if num_classes <= 32 and pixels <= tile * multiprocessors(device):
        tile, warps = tile // 2, warps // 2
    channels = 64 // bytes_per_feature if num_classes <= 32 else 16
    return FeatureTiling(of_pixels.blocks, product_blocks(num_classes), tile, warps, channels, 32)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the CPU, on which kernels are interpreted, and of "meta", a number like a GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132
