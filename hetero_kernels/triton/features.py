"""Features in Triton: tiles of pixels counted through an image's rows, the 1x1 projection and its weight gradient.

Matrix products leave a pixel's classes to several threads and pad them to 16, which the per-pixel mathematics would pay
for: a program writes its tile's logits where their gradient will be and reads them back as the blocks of
pixel_math.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixel_math import PADDING
from .tile import Pixels, class_numbers, load_labels, shown


class Features(NamedTuple):
    """A network's features and projection, and where the gradients go."""

    data: Any  # [B, C, h, w]
    channels: Any
    stride_b: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any  # of neighbouring pixels in any row, where rows follow each other (FLAT)
    weight: Any  # [K, C]
    weight_stride_k: Any
    weight_stride_c: Any
    bias: Any  # [K]
    gradient: Any  # of the logits, [B, K, h, w]; or the logits
    partial: Any  # [splits, K, C + 1]: of weight and bias; of the weight alone where the projection is on its own
    pilot: Any  # [C] that is subtracted from the features, or None


class Flat(NamedTuple):
    """The loss grid, divided into tiles of pixels that are counted through an image's rows."""

    height: Any
    width: Any
    size: Any
    tiles: Any


@triton.jit
def flat_of(given, MULTIPLE: tl.constexpr):
    """``given`` as it was; ``size`` is a multiple of MULTIPLE, which loads and stores of several pixels ask for. (Of
    what ``shown`` returns the compiler would forget it.)"""
    size = tl.multiple_of(~given.size >> 1, MULTIPLE)
    return Flat(shown(given.height), shown(given.width), size, shown(given.tiles))


@triton.jit
def locate_flat(program, grid, PIXELS: tl.constexpr):
    """What a program owns, each pixel's row, and its number in the image (which may lie beyond the end)."""
    n = program % grid.tiles * PIXELS + tl.arange(0, PIXELS)
    image = tl.cast(program // grid.tiles, tl.int64)
    at = tl.minimum(n, grid.size - 1)
    return Pixels(image, 0, 0, 0, at % grid.width, n < grid.size), at // grid.width, n


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """A factor of a matrix product in its dtype; in float32 where Triton's interpreter, for which bfloat16 is wrong,
    executes the kernel."""
    if PRECISION == "interpreted":
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def rounded(x, ROUNDING: tl.constexpr):
    """float32 rounded to another dtype's numbers, to the nearest and even one. By its bits to bfloat16: Triton's
    interpreter truncates."""
    if ROUNDING == "bfloat16":
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.float16).to(tl.float32)


@triton.jit
def load_features(
    network, pixels, y, n, start, CHANNELS: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """Channels from ``start`` on [CHANNELS, pixels], less the pilot where there is one; else 0 beyond."""
    c = start + tl.arange(0, CHANNELS)
    if FLAT:
        place = tl.cast(n, tl.int64) * network.stride_w
    else:
        place = tl.cast(y, tl.int64) * network.stride_h + tl.cast(pixels.x, tl.int64) * network.stride_w
    at = network.data + pixels.image * network.stride_b
    at += (tl.cast(c, tl.int64) * network.stride_c)[:, None] + place[None, :]
    f = tl.load(at, mask=(c < network.channels)[:, None] & pixels.inside[None, :], other=0.0)
    if ROUNDING != "none":
        f = rounded(f.to(tl.float32), ROUNDING)
    if network.pilot is not None:
        f = f.to(tl.float32) - tl.load(network.pilot + c, mask=c < network.channels, other=0.0)[:, None]
    return factor(f, PRECISION)


@triton.jit
def load_weight(network, k, classes, c, PRECISION: tl.constexpr):
    """Weights [classes, channels] of a block of classes; 0 beyond."""
    at = network.weight + tl.cast(k, tl.int64) * network.weight_stride_k
    at += (tl.cast(c, tl.int64) * network.weight_stride_c)[None, :]
    return factor(tl.load(at, mask=(k < classes) & (c < network.channels)[None, :], other=0.0), PRECISION)


@triton.jit
def tf32_parts(x):
    """Two numbers of a tensor core's 11 bits whose sum is x to 23 bits."""
    big = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return big, x - big


@triton.jit
def matrix_product(a, b, PRECISION: tl.constexpr):
    """a b with float32 sums. PRECISION: "tf32" and "ieee" are the device's; else a factor that has more bits than a
    tensor core takes comes in two parts."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        out = tl.dot(a, b)
    elif PRECISION == "tf32" or PRECISION == "ieee":
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    else:
        big, small = tf32_parts(a.to(tl.float32))
        y_big, y_small = tf32_parts(b.to(tl.float32))
        out = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
        if b.dtype == tl.float32:
            out = tl.dot(big, y_small, out, input_precision="tf32")
        if a.dtype == tl.float32:
            out = tl.dot(small, y_big, out, input_precision="tf32")
        out = tl.dot(big, y_big, out, input_precision="tf32")
    return out


@triton.jit
def project_tile(
    network, pixels, y, n, k, classes, one, CHANNELS: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """A tile's logits of classes ``k``, as blocks [classes, pixels] without the bias.

    ``one`` is 1, which the compiler does not know: sums over many channels then leave the tensor cores, which round
    towards zero, after every ``CHANNELS`` of them.
    """
    z = ()
    for i in tl.static_range(len(k)):
        z = z + (tl.zeros([n.shape[0], k[i].shape[0]], tl.float32),)
    for start in range(0, network.channels, CHANNELS):
        f = tl.trans(load_features(network, pixels, y, n, start, CHANNELS, FLAT, PRECISION, ROUNDING))
        more = ()
        for i in tl.static_range(len(k)):
            w = tl.trans(load_weight(network, k[i], classes, start + tl.arange(0, CHANNELS), PRECISION))
            more = more + (tl.fma(matrix_product(f, w, PRECISION), one, z[i]),)
        z = more
    out = ()
    for i in tl.static_range(len(k)):
        out = out + (tl.trans(z[i]),)
    return out


@triton.jit
def project(
    network, pixels, y, n, classes, grid, one, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's logits, to where their gradient will be."""
    k = class_numbers(BLOCKS)
    z = project_tile(network, pixels, y, n, k, classes, one, CHANNELS, FLAT, PRECISION, "none")
    out = ()
    for i in tl.static_range(len(k)):
        logits = z[i]
        if BIAS:
            logits += tl.load(network.bias + k[i], mask=k[i] < classes, other=0.0).to(tl.float32)
        out = out + (logits,)
    store_tile(network, pixels, n, k, classes, grid, out)


@triton.jit
def offset_of(pixels, n, k, classes, grid):
    """Of a tile's values in [B, K, h, w] without gaps."""
    return (pixels.image * classes + k) * tl.cast(grid.size, tl.int64) + n[None, :]


@triton.jit
def place(network, pixels, n, k, classes, grid):
    """Where a tile's logits or their gradient are."""
    return network.gradient + offset_of(pixels, n, k, classes, grid)


@triton.jit
def store_tile(network, pixels, n, k, classes, grid, values):
    for i in tl.static_range(len(k)):
        inside = (k[i] < classes) & pixels.inside[None, :]
        tl.store(place(network, pixels, n, k[i], classes, grid), values[i], mask=inside)


@triton.jit
def load_tile(network, pixels, n, k, classes, grid):
    """Logits of a tile as blocks; ``PADDING`` beyond K."""
    out = ()
    for i in tl.static_range(len(k)):
        inside = (k[i] < classes) & pixels.inside[None, :]
        z = tl.load(place(network, pixels, n, k[i], classes, grid), mask=inside, other=0.0)
        out = out + (z + tl.where(k[i] < classes, 0.0, PADDING),)
    return out


@triton.jit
def weight_gradient(
    network, labels, grid, classes, block, split, splits, images, one,
    BLOCKS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FLAT: tl.constexpr, SAMPLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program of one network: CHANNELS columns of a ``partial``, from every ``splits``-th tile of pixels.

    After the last channel comes one that is 1 everywhere, whose weight is the bias.
    """
    k = class_numbers(BLOCKS)
    start = block * CHANNELS
    c = start + tl.arange(0, CHANNELS)
    sums = ()
    for i in tl.static_range(len(k)):
        sums = sums + (tl.zeros([k[i].shape[0], CHANNELS], tl.float32),)
    for program in range(split, images * grid.tiles, splits):
        pixels, y, n = locate_flat(program, grid, PIXELS)
        _, valid, _ = load_labels(labels, pixels, y, classes, SAMPLED)
        f = load_features(network, pixels, y, n, start, CHANNELS, FLAT, PRECISION, "none")
        # NaN and inf where nothing counts would make 0 times them NaN.
        f = tl.where(valid[None, :], tl.where(c[:, None] == network.channels, 1.0, f), 0.0).to(f.dtype)
        f = tl.trans(f)
        more = ()
        for i in tl.static_range(len(k)):
            inside = (k[i] < classes) & pixels.inside[None, :]
            g = tl.load(place(network, pixels, n, k[i], classes, grid), mask=inside, other=0.0)
            more = more + (tl.fma(matrix_product(g, f, PRECISION), one, sums[i]),)
        sums = more
    columns = network.channels + 1
    for i in tl.static_range(len(k)):
        at = network.partial + (tl.cast(split, tl.int64) * classes + k[i]) * columns + c[None, :]
        tl.store(at, sums[i], mask=(k[i] < classes) & (c[None, :] < columns))


@triton.jit
def finish_weights(
    network, weight_gradient, bias_gradient, program, classes, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of the ``partial``s: [K, C] and [K]."""
    columns = network.channels + 1
    size = tl.cast(classes, tl.int64) * columns
    i = tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        g += tl.load(network.partial + split * size + i, mask=inside, other=0.0)
    k, c = i // columns, i % columns
    tl.store(weight_gradient + k * network.channels + c, g, mask=inside & (c < network.channels))
    if BIAS:
        tl.store(bias_gradient + k, g, mask=inside & (c == network.channels))
