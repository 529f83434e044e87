"""The projection on its own in Triton: raw logits and their batch statistics, and back.

Forward a program owns a tile of pixels and goes through its channels. Backward there are two launches, which both form
the gradient of raw logits on the way: the weights' gradient, for which a program owns a block of channels and goes
through every so many-th tile, reads the features; theirs, tile by tile, only writes. More classes than registers hold
come in chunks, for each of which a tile's features are read, from a cache where it can.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import reads_channels_last
from .features import (
    flat_of,
    load_features,
    load_weight,
    locate_flat,
    matrix_product,
    offset_of,
    project_tile,
    store_tile,
)
from .launch import FeatureGrid, device_guard, feature_argument, product_precision, rows_follow
from .tile import class_numbers
from .tuning import ProductTiling, back_tilings_of, cdiv, multiprocessors, project_tilings_of, tuned

# Forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def mean_of_run(
    network, c, grid, images, run, number: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr, FLAT: tl.constexpr
):
    """Of one of ``RUNS`` runs of ``run`` neighbouring pixels, spread over batch and image."""
    i = tl.arange(0, RUN)
    n = tl.minimum((2 * number + 1) * tl.cast(grid.size, tl.int64) // (2 * RUNS), grid.size - run) + i
    place = tl.cast(number * images // RUNS, tl.int64) * network.stride_b
    if FLAT:
        place += n * network.stride_w
    else:
        place += n // grid.width * network.stride_h + n % grid.width * network.stride_w
    at = network.data + (tl.cast(c, tl.int64) * network.stride_c)[:, None] + place[None, :]
    f = tl.load(at, mask=(c < network.channels)[:, None] & (i < run)[None, :], other=0.0)
    return tl.sum(f.to(tl.float32), 1) / run


@triton.jit(do_not_specialize=["images", "run"])
def pilot_kernel(
    out, network, grid, images, run, RUN: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """A value near each channel's mean: the median of four runs' means, so that one pixel far from all others does not
    move it; of those that are numbers, 0 where none is."""
    grid = flat_of(grid, 1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m = ()
    numbers = tl.zeros([CHANNELS], tl.int32)
    for i in tl.static_range(4):
        mean = mean_of_run(network, c, grid, images, run, i, 4, RUN, FLAT)
        finite = tl.abs(mean) < float("inf")
        numbers += finite.to(tl.int32)
        m = m + (tl.where(finite, mean, float("inf")),)
    low, high = tl.minimum(m[0], m[1]), tl.maximum(m[0], m[1])
    other_low, other_high = tl.minimum(m[2], m[3]), tl.maximum(m[2], m[3])
    first, second = tl.minimum(low, other_low), tl.maximum(low, other_low)
    third = tl.minimum(high, other_high)
    second, third = tl.minimum(second, third), tl.maximum(second, third)
    below = tl.where(numbers <= 2, first, second)
    above = tl.where(numbers >= 4, third, tl.where(numbers >= 2, second, first))
    pilot = tl.where(numbers > 0, 0.5 * below + 0.5 * above, 0.0)
    tl.store(out + c, pilot, mask=c < network.channels)


@triton.jit(do_not_specialize=["tiles"])
def project_kernel(
    network, parts, grid, classes, chunks, tiles, one, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, MULTIPLE: tl.constexpr,
    STATISTICS: tl.constexpr, ROUNDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw logits of a tile of pixels and a chunk of classes; STATISTICS: and their mean and sum of squared differences
    from it, to ``parts`` [2, K, tiles]."""
    grid = flat_of(grid, MULTIPLE)
    program = tl.program_id(0)
    chunk, tile = program % chunks, program // chunks
    pixels, y, n = locate_flat(tile, grid, PIXELS)
    k = class_numbers(BLOCKS, chunk * CHUNK)
    z = project_tile(network, pixels, y, n, k, classes, one, CHANNELS, FLAT, PRECISION, ROUNDING)
    store_tile(network, pixels, n, k, classes, grid, z)
    if STATISTICS:
        number = tl.sum(pixels.inside.to(tl.float32), 0)
        for i in tl.static_range(len(k)):
            mean = tl.sum(tl.where(pixels.inside[None, :], z[i], 0.0), 1)[:, None] / number
            off = tl.where(pixels.inside[None, :], z[i] - mean, 0.0)
            at = parts + tl.cast(k[i], tl.int64) * tiles + tile
            tl.store(at, mean, mask=k[i] < classes)
            squares = tl.sum(off * off, 1)[:, None]
            tl.store(at + tl.cast(classes, tl.int64) * tiles, squares, mask=k[i] < classes)


@triton.jit(do_not_specialize=["tiles", "count"])
def statistics_kernel(
    out, parts, network, grid, classes, tiles, count, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A class of ``out`` [4, K]: number of pixels, mean, sum of squared differences from it, weight times pilot."""
    grid = flat_of(grid, 1)
    k = tl.program_id(0)
    pixels = tl.cast(count, tl.float64)
    means = parts + tl.cast(k, tl.int64) * tiles
    squares = means + tl.cast(classes, tl.int64) * tiles
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number = tl.minimum(grid.size - i % grid.tiles * PIXELS, PIXELS).to(tl.float64)
        sums += number * tl.load(means + i, mask=i < tiles, other=0.0).to(tl.float64)
    mean = tl.sum(sums, 0) / pixels
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number = tl.minimum(grid.size - i % grid.tiles * PIXELS, PIXELS).to(tl.float64)
        off = tl.load(means + i, mask=i < tiles, other=0.0).to(tl.float64) - mean
        of_tile = tl.load(squares + i, mask=i < tiles, other=0.0).to(tl.float64)
        sums += tl.where(i < tiles, of_tile + number * off * off, 0.0)
    moved = tl.zeros([BLOCK], tl.float64)
    for start in range(0, network.channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = network.weight + tl.cast(k, tl.int64) * network.weight_stride_k
        w = tl.load(at + tl.cast(c, tl.int64) * network.weight_stride_c, mask=c < network.channels, other=0.0)
        f0 = tl.load(network.pilot + c, mask=c < network.channels, other=0.0)
        moved += w.to(tl.float64) * f0.to(tl.float64)
    tl.store(out + k, pixels)
    tl.store(out + classes + k, mean)
    tl.store(out + 2 * classes + k, tl.sum(sums, 0))
    tl.store(out + 3 * classes + k, tl.sum(moved, 0))


# Back ------------------------------------------------------------------------------------------------------------


class LogitGradient(NamedTuple):
    """What the gradient of raw logits z is made of: ``given`` + mean_gradient ``inverse`` + 2 squares_gradient
    (z - mean)."""

    given: Any  # [B, K, h, w] without gaps, or None
    logits: Any  # z, the same
    statistics: Any  # float64 [4, K], as project leaves them, or None
    by_statistics: Any  # their gradient, or None
    inverse: Any  # 1 / number of pixels


@triton.jit
def coefficients(gradient, k, classes):
    """Constant, mean and slope of classes ``k`` [classes, 1]."""
    constant, mean, slope = k * 0.0, k * 0.0, k * 0.0
    if gradient.by_statistics is not None:
        inside = k < classes
        mean = tl.load(gradient.statistics + classes + k, mask=inside, other=0.0).to(tl.float32)
        constant = tl.load(gradient.by_statistics + classes + k, mask=inside, other=0.0).to(tl.float32)
        constant *= gradient.inverse
        slope = 2.0 * tl.load(gradient.by_statistics + 2 * classes + k, mask=inside, other=0.0).to(tl.float32)
    return constant, mean, slope


@triton.jit
def logit_gradient(gradient, numbers, pixels, n, k, classes, grid):
    """A tile's gradient of raw logits of classes ``k``; 0 beyond. ``numbers``: their :func:`coefficients`."""
    inside = (k < classes) & pixels.inside[None, :]
    offset = offset_of(pixels, n, k, classes, grid)
    g = tl.zeros([k.shape[0], n.shape[0]], tl.float32)
    if gradient.given is not None:
        g = tl.load(gradient.given + offset, mask=inside, other=0.0)
    if gradient.by_statistics is not None:
        z = tl.load(gradient.logits + offset, mask=inside, other=0.0)
        g = tl.where(inside, g + (numbers[0] + numbers[2] * (z - numbers[1])), 0.0)
    return g


@triton.jit
def store_features(
    out, network, pixels, n, c, stride_b, stride_c, stride_p, values
):  # fmt: skip
    """A tile [channels, pixels] of the features' gradient."""
    at = out + pixels.image * stride_b + (tl.cast(c, tl.int64) * stride_c)[:, None] + (n * tl.cast(stride_p, tl.int64))
    tl.store(at, values.to(out.dtype.element_ty), mask=(c < network.channels)[:, None] & pixels.inside[None, :])


@triton.jit(do_not_specialize=["splits", "images"])
def weights_kernel(
    network, gradient, grid, classes, column_blocks, chunks, splits, images, one,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr,
    MULTIPLE: tl.constexpr, ROUNDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHANNELS columns of a part of the weights' gradient [splits, K, C], of a chunk of classes and every ``splits``-th
    tile of pixels."""
    grid = flat_of(grid, MULTIPLE)
    program = tl.program_id(0)
    start = program % column_blocks * CHANNELS
    c = start + tl.arange(0, CHANNELS)
    program = program // column_blocks
    chunk, split = program % chunks, program // chunks
    k = class_numbers(BLOCKS, chunk * CHUNK)
    sums, numbers = (), ()
    for i in tl.static_range(len(k)):
        sums = sums + (tl.zeros([k[i].shape[0], CHANNELS], tl.float32),)
        numbers = numbers + (coefficients(gradient, k[i], classes),)
    for tile in range(split, images * grid.tiles, splits):
        pixels, y, n = locate_flat(tile, grid, PIXELS)
        f = load_features(network, pixels, y, n, start, CHANNELS, FLAT, PRECISION, ROUNDING)
        if gradient.by_statistics is None:  # a pixel without a gradient counts 0, though its features be NaN
            reached = tl.zeros([PIXELS], tl.int32)
            for i in tl.static_range(len(k)):
                g = logit_gradient(gradient, numbers[i], pixels, n, k[i], classes, grid)
                reached = tl.maximum(reached, tl.max((g != 0.0).to(tl.int32), 0))
            f = tl.where(reached[None, :] != 0, f, 0.0).to(f.dtype)
        f = tl.trans(f)
        more = ()
        for i in tl.static_range(len(k)):
            g = logit_gradient(gradient, numbers[i], pixels, n, k[i], classes, grid)
            more = more + (tl.fma(matrix_product(g, f, PRECISION), one, sums[i]),)
        sums = more
    for i in tl.static_range(len(k)):
        at = network.partial + (tl.cast(split, tl.int64) * classes + k[i]) * network.channels + c[None, :]
        tl.store(at, sums[i], mask=(k[i] < classes) & (c[None, :] < network.channels))


@triton.jit
def project_back_kernel(
    out, network, gradient, factor, classes, grid, column_blocks, stride_b, stride_c, stride_p, one,
    CLASSES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FACTOR: tl.constexpr,
    MULTIPLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``out`` [B, C, h, w] = ``factor`` times the logits' gradient [B, K, h, w] through the weights."""
    grid = flat_of(grid, MULTIPLE)
    program = tl.program_id(0)
    c = program % column_blocks * CHANNELS + tl.arange(0, CHANNELS)
    pixels, _, n = locate_flat(program // column_blocks, grid, PIXELS)
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for start in range(0, classes, CLASSES):
        k = start + tl.arange(0, CLASSES)[:, None]
        w = load_weight(network, k, classes, c, PRECISION)
        g = logit_gradient(gradient, coefficients(gradient, k, classes), pixels, n, k, classes, grid)
        sums = tl.fma(matrix_product(tl.trans(w), g, PRECISION), one, sums)
    if FACTOR:
        sums *= tl.load(factor).to(tl.float32)
    store_features(out, network, pixels, n, c, stride_b, stride_c, stride_p, sums)


@triton.jit(do_not_specialize=["splits"])
def finish_weight_kernel(out, network, gradient, classes, splits, BLOCK: tl.constexpr):
    """The weights' gradient [K, C] from its parts, and what the pilot's share of the running mean gets."""
    size = tl.cast(classes, tl.int64) * network.channels
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        g += tl.load(network.partial + split * size + i, mask=inside, other=0.0)
    if gradient.by_statistics is not None:
        offset = tl.load(gradient.by_statistics + 3 * classes + i // network.channels, mask=inside, other=0.0)
        g += offset.to(tl.float32) * tl.load(network.pilot + i % network.channels, mask=inside, other=0.0)
    tl.store(out + i, g, mask=inside)


# The operators ---------------------------------------------------------------------------------------------------

PILOT_RUN, PILOT_CHANNELS = 16, 16
FINISH_BLOCK = 512
BACK_CLASSES, BACK_PIXELS, BACK_CHANNELS = 32, 64, 128
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _rounded(weight: Tensor, features: Tensor, rounding: str) -> tuple[Tensor, str]:
    """The weight's factors, and how features are rounded when they are read: not at all where they are already."""
    if rounding == "none":
        return weight, rounding
    return weight.to(_DTYPES[rounding]), "none" if features.dtype == _DTYPES[rounding] else rounding


@tuned(project_tilings_of)
def project(
    tiling: ProductTiling, features: Tensor, weight: Tensor, statistics: bool, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Implementation of the operator ``project``, see ops/projection.py."""
    batch, channels, height, width = features.shape
    classes = weight.shape[0]
    factors, rounding = _rounded(weight, features, rounding)
    grid = FeatureGrid(batch, height, width, tiling.pixels)
    logits = features.new_empty((batch, classes, height, width), dtype=torch.float32)
    pilot = logits.new_empty(channels if statistics else 0)
    found = logits.new_empty((4, classes) if statistics else (0, 0), dtype=torch.float64)
    if grid.programs == 0:
        return logits, pilot.zero_(), found.zero_()
    parts = logits.new_empty((2, classes, grid.programs) if statistics else 0)
    network = feature_argument(features, factors, factors, logits, logits, pilot if statistics else None)
    chunks = cdiv(classes, tiling.classes)
    with device_guard(features):
        if statistics:
            pilot_kernel[(cdiv(channels, PILOT_CHANNELS),)](
                pilot, network, grid.argument, batch, min(PILOT_RUN, height * width), RUN=PILOT_RUN,
                CHANNELS=PILOT_CHANNELS, FLAT=rows_follow(features), num_warps=4,
            )  # fmt: skip
        project_kernel[(grid.programs * chunks,)](
            network, parts, grid.argument, classes, chunks, grid.programs, 1.0, BLOCKS=tiling.blocks,
            CHUNK=tiling.classes, PIXELS=tiling.pixels, CHANNELS=tiling.channels, FLAT=rows_follow(features),
            MULTIPLE=grid.multiple, STATISTICS=statistics, ROUNDING=rounding, PRECISION=product_precision(features),
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if statistics:
            statistics_kernel[(classes,)](
                found, parts, network, grid.argument, classes, grid.programs, batch * height * width,
                PIXELS=tiling.pixels, BLOCK=256, num_warps=4,
            )  # fmt: skip
    return logits, pilot, found


def empty_gradient(features: Tensor, channels_last: bool) -> Tensor:
    """For a gradient of features. The interpreter truncates to bfloat16 where a GPU rounds: there torch rounds."""
    dtype = torch.float32 if features.device.type == "cpu" else features.dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(features, dtype=dtype, memory_format=memory_format)


def _strides(out: Tensor) -> tuple[int, int, int]:
    """Of images, channels and pixels of what :func:`empty_gradient` made, whatever torch says of axes of length 1."""
    _, channels, height, width = out.shape
    channels_last = out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    by_channel, by_pixel = (1, channels) if channels_last else (height * width, 1)
    return channels * height * width, by_channel, by_pixel


def features_gradient(
    like: Tensor, weight: Tensor, gradient: LogitGradient, factor: Tensor | None, out: Tensor
) -> Tensor:
    """Takes the logits' gradient [B, K, h, w] through the weights, times ``factor``: into ``out``, in the dtype of
    ``like``."""
    batch, channels, height, width = like.shape
    grid = FeatureGrid(batch, height, width, BACK_PIXELS)
    blocks = cdiv(channels, BACK_CHANNELS)
    with device_guard(like):
        project_back_kernel[(grid.programs * blocks,)](
            out, feature_argument(like, weight, weight, weight, weight), gradient,
            out if factor is None else factor, weight.shape[0], grid.argument, blocks, *_strides(out), 1.0,
            CLASSES=BACK_CLASSES, PIXELS=BACK_PIXELS, CHANNELS=BACK_CHANNELS, FACTOR=factor is not None,
            MULTIPLE=grid.multiple, PRECISION=product_precision(like), num_warps=8,
        )  # fmt: skip
    return out.to(like.dtype)


@tuned(back_tilings_of)
def project_gradients(
    tiling: ProductTiling, by_logits: Tensor | None, by_statistics: Tensor | None, features: Tensor, weight: Tensor,
    logits: Tensor, pilot: Tensor, statistics: Tensor, rounding: str, features_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Implementation of the operator ``project_gradients``, see ops/projection.py."""
    batch, channels, height, width = features.shape
    classes = weight.shape[0]
    factors, rounding = _rounded(weight, features, rounding)
    grid = FeatureGrid(batch, height, width, tiling.pixels)
    out = empty_gradient(features, reads_channels_last(features)) if features_grad else features.new_empty(0)
    by_weight = logits.new_empty(weight.shape if weight_grad else 0)
    if grid.programs == 0:
        return out.to(features.dtype), by_weight.zero_().to(weight.dtype if weight_grad else logits.dtype)
    measured = by_statistics is not None and statistics.numel() > 0
    gradient = LogitGradient(
        None if by_logits is None else by_logits.contiguous(), logits.contiguous() if measured else None,
        statistics.contiguous() if measured else None, by_statistics.contiguous() if measured else None,
        1.0 / (batch * height * width),
    )  # fmt: skip
    if weight_grad:
        columns, chunks = cdiv(channels, tiling.channels), cdiv(classes, tiling.classes)
        # As many parts as fill the device, of at most an eighth of the features' size.
        enough = cdiv(4 * multiprocessors(features.device), columns * chunks)
        splits = max(1, min(enough, batch * height * width // (8 * classes), grid.programs))
        parts = by_weight.new_empty(splits, classes, channels)
        centre = pilot if pilot.numel() > 0 else None
        network = feature_argument(features, factors, factors, parts, parts, centre)
        with device_guard(features):
            weights_kernel[(columns * chunks * splits,)](
                network, gradient, grid.argument, classes, columns, chunks, splits, batch, 1.0, BLOCKS=tiling.blocks,
                CHUNK=tiling.classes, PIXELS=tiling.pixels, CHANNELS=tiling.channels, FLAT=rows_follow(features),
                MULTIPLE=grid.multiple, ROUNDING=rounding, PRECISION=product_precision(features),
                num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
            finish_weight_kernel[(cdiv(by_weight.numel(), FINISH_BLOCK),)](
                by_weight, network, gradient, classes, splits, BLOCK=FINISH_BLOCK, num_warps=4
            )
    if features_grad:
        out = features_gradient(features, factors, gradient, None, out)
    return out, by_weight.to(weight.dtype if weight_grad else logits.dtype)
