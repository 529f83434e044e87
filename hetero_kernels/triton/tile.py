"""The loss grid in Triton: which pixels a program owns, interpolation on the way in, its adjoint on the way out.

Bilinear interpolation puts pixel y at (y P + Q) / D on the coarse grid, with integers P, Q, D: positions are exact.
Rows between the same two coarse rows of every network are a *band*; a program owns some rows of a band and a *tile* of
columns, so it interpolates horizontally once, keeps both coarse rows in registers and adds its gradient up there. What
leaves it is a *slot* [2 coarse rows, K, span], span being the coarse columns that a tile can reach; reduction.py writes
slots and adds them up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixel_math import PADDING

# ``tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])`` of pointers [classes, pixels] gives neighbouring threads
# neighbouring pixels, so that a sum over classes stays in a thread: where no axis looks contiguous, Triton 3.6 gives
# them neighbouring classes. The two contiguous pixels may be a pretext; with an alignment of one byte no vector access
# believes it. A hint holds where it is written, not through a call, and must not meet a single class: with one column
# the compiler makes that a scalar, which the hint's two axes break.


# Triton specialises every integer of a tuple: it makes a constant of 1 and a kernel of its own for multiples of 16,
# which random crops would compile again and again for. So what changes with a crop is given as ``hidden`` (launch.py)
# makes it, which is neither: a kernel begins with ``labels_of`` and ``grid_of``, and numbers of networks and upstream
# factors are ``shown`` where they are read. (Triton 3.6 has no functions that return tuples with None in them; and what
# is asked for after a loop is not kept in a register through it.) Strides of neighbouring pixels stay as they are: they
# are 1 nearly always.


class Network(NamedTuple):
    """A network's logits, where their gradient goes, and the geometry of both.

    Logits may be raw: ``scale`` and ``shift`` [K] then say what they mean, ``floor`` what that is at least (0 after a
    ReLU); each is None where there is none. ``sums`` [parts, 2, K] takes the parts of scale's and shift's gradients.
    """

    logits: Any
    gradient: Any  # slots, or the gradient itself [B, K, h, w] where the network has the loss grid
    height: Any
    width: Any
    stride_b: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any
    span: Any
    scale: Any
    shift: Any
    floor: Any
    sums: Any


class Labels(NamedTuple):
    data: Any
    height: Any
    width: Any
    stride_b: Any
    stride_h: Any
    stride_w: Any
    rows_scale: Any  # of nearest neighbour sampling
    columns_scale: Any
    ignore_index: Any


class Upstream(NamedTuple):
    """Factors of the pixels' gradients, [B, loss grid]."""

    data: Any
    stride_b: Any
    stride_h: Any
    stride_w: Any


class Grid(NamedTuple):
    """The loss grid and how programs divide it."""

    height: Any
    width: Any
    student_height: Any
    teacher_height: Any
    bands: Any
    splits: Any  # programs that share a band
    tiles: Any


class Pixels(NamedTuple):
    """What a program owns: rows [begin, end) of an image, columns x from ``first`` on (clamped beyond the grid)."""

    image: Any
    begin: Any
    end: Any
    first: Any
    x: Any
    inside: Any


class Columns(NamedTuple):
    """A network's coarse neighbours of a tile's pixels, and the weight of the right one. A pixel on a coarse position
    has it as both, half of each: an infinity beside it must not be multiplied by 0."""

    left: Any
    right: Any
    part: Any
    first: Any  # neighbour of the tile's first pixel


# Numbers as they were ------------------------------------------------------------------------------------------


@triton.jit
def shown(n):
    """What launch.py's ``hidden`` was given."""
    return ~n >> 1


@triton.jit
def labels_of(given):
    return Labels(
        given.data, shown(given.height), shown(given.width), shown(given.stride_b), shown(given.stride_h),
        given.stride_w, given.rows_scale, given.columns_scale, given.ignore_index,
    )  # fmt: skip


@triton.jit
def grid_of(given):
    return Grid(
        shown(given.height), shown(given.width), shown(given.student_height), shown(given.teacher_height),
        shown(given.bands), shown(given.splits), shown(given.tiles),
    )  # fmt: skip


# Positions -----------------------------------------------------------------------------------------------------


@triton.jit
def axis(coarse, fine, ALIGN: tl.constexpr):
    """P, Q, D of an axis."""
    if ALIGN:
        p, q, d = coarse - 1, coarse * 0, tl.maximum(fine - 1, 1)
    else:
        p, q, d = 2 * coarse, coarse - fine, 2 * fine
    return p, q, d


@triton.jit
def lower(y, coarse, fine, ALIGN: tl.constexpr):
    """Coarse neighbour before pixel y; the other one is the next, or the same at the end."""
    p, q, d = axis(coarse, fine, ALIGN)
    return tl.maximum(y * p + q, 0) // d


@triton.jit
def fraction(y, at, coarse, fine, ALIGN: tl.constexpr):
    """Weight of the other neighbour of pixel y, whose lower one is ``at``."""
    p, q, d = axis(coarse, fine, ALIGN)
    return tl.cast(tl.maximum(y * p + q - at * d, 0), tl.float32) / tl.cast(d, tl.float32)


@triton.jit
def first_pixel(at, coarse, fine, ALIGN: tl.constexpr):
    """First pixel whose lower neighbour is ``at`` or more; ``fine`` if there is none."""
    p, q, d = axis(coarse, fine, ALIGN)
    y = tl.cdiv(tl.maximum(at * d - q, 0), tl.maximum(p, 1))
    return tl.where(at <= 0, 0, tl.where(p == 0, fine, tl.minimum(y, fine)))


@triton.jit
def band_of(y, grid, ALIGN: tl.constexpr, SAME: tl.constexpr):
    """Number of row y's band. SAME: both networks have the same height."""
    n = lower(y, grid.student_height, grid.height, ALIGN)
    if not SAME:
        n += lower(y, grid.teacher_height, grid.height, ALIGN)
    return n


@triton.jit
def band_start(band, grid, ALIGN: tl.constexpr, SAME: tl.constexpr):
    """First row of a band or, where the band has none, of the next that has."""
    if SAME:
        start = first_pixel(band, grid.student_height, grid.height, ALIGN)
    else:
        start, end = tl.cast(grid.height * 0, tl.int32), tl.cast(grid.height, tl.int32)
        while start < end:
            middle = (start + end) // 2
            below = band_of(middle, grid, ALIGN, SAME) < band
            start = tl.where(below, middle + 1, start)
            end = tl.where(below, end, middle)
    return start


@triton.jit
def columns_of(pixels, network, grid, ALIGN: tl.constexpr):
    width = shown(network.width)
    left = lower(pixels.x, width, grid.width, ALIGN)
    part = fraction(pixels.x, left, width, grid.width, ALIGN)
    first = lower(pixels.first, width, grid.width, ALIGN)
    on = part == 0.0
    right = tl.where(on, left, tl.minimum(left + 1, width - 1))
    return Columns(left, right, tl.where(on, 0.5, part), first)


@triton.jit
def locate(program, grid, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr):
    """What a program owns."""
    first = program % grid.tiles * TILE
    x = first + tl.arange(0, TILE)
    program = program // grid.tiles
    split = program % grid.splits
    program = program // grid.splits
    band, image = program % grid.bands, program // grid.bands
    begin = band_start(band, grid, ALIGN, SAME) + split * ROWS
    end = tl.minimum(begin + ROWS, band_start(band + 1, grid, ALIGN, SAME))
    return Pixels(tl.cast(image, tl.int64), begin, end, first, tl.minimum(x, grid.width - 1), x < grid.width)


# Blocks of classes ---------------------------------------------------------------------------------------------


@triton.jit
def class_numbers(BLOCKS: tl.constexpr, first=0):
    """Numbers [classes, 1] of every block, from ``first`` on; BLOCKS are the blocks' lengths."""
    out = (first + tl.arange(0, BLOCKS[0])[:, None],)
    start: tl.constexpr = 0
    for i in tl.static_range(1, len(BLOCKS)):
        start = start + BLOCKS[i - 1]
        out = out + (first + start + tl.arange(0, BLOCKS[i])[:, None],)
    return out


@triton.jit
def zeros(c, pixels, WANTED: tl.constexpr = True):
    """Blocks of zeros; none at all where they are not wanted: even zeros take registers."""
    out = ()
    if WANTED:
        for i in tl.static_range(len(c)):
            out = out + (tl.zeros_like(c[i] + pixels.x[None, :]).to(tl.float32),)
    return out


@triton.jit
def load_per_class(data, c, classes):
    """Values [classes, 1] of a contiguous vector [K], 0 beyond."""
    out = ()
    for i in tl.static_range(len(c)):
        out = out + (tl.load(data + c[i], mask=c[i] < classes, other=0.0).to(tl.float32),)
    return out


# Logits in -----------------------------------------------------------------------------------------------------


@triton.jit
def normalized(network, c, classes, z):
    """``scale z + shift`` of raw logits of classes ``c``."""
    scale = tl.load(network.scale + c, mask=c < classes, other=0.0)
    return z * scale + tl.load(network.shift + c, mask=c < classes, other=0.0)


@triton.jit
def meant(network, c, classes, z):
    """What logits of classes ``c`` mean where they are raw; a NaN passes."""
    if network.scale is not None:
        z = normalized(network, c, classes, z)
        if network.floor is not None:
            z = tl.maximum(z, network.floor, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def addresses(network, c, image, row, column):
    """Where the blocks of logits of a coarse row are, at ``column`` [pixels]."""
    start = network.logits + image * shown(network.stride_b) + tl.cast(row, tl.int64) * shown(network.stride_h)
    out = ()
    for i in tl.static_range(len(c)):
        offset = tl.cast(c[i], tl.int64) * shown(network.stride_c)
        at = start + (offset + (tl.cast(column, tl.int64) * network.stride_w)[None, :])
        if c[i].shape[0] > 1:
            at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])
        out = out + (at,)
    return out


@triton.jit
def load_at(network, c, classes, at):
    """A block of logits; ``PADDING`` beyond K."""
    z = meant(network, c, classes, tl.load(at, mask=c < classes, other=0.0).to(tl.float32))
    return z + tl.where(c < classes, 0.0, PADDING)


@triton.jit
def load_block(network, c, classes, image, row, column):
    """A block of logits of a coarse row at ``column`` [pixels]."""
    return load_at(network, c, classes, addresses(network, (c,), image, row, column)[0])


@triton.jit
def load_row(network, c, classes, image, row, column):
    at, out = addresses(network, c, image, row, column), ()
    for i in tl.static_range(len(c)):
        out = out + (load_at(network, c[i], classes, at[i]),)
    return out


@triton.jit
def between(a, b, part, FINITE: tl.constexpr):
    """(1 - f) a + f b, not a + f (b - a): between -10 and 10 the difference alone is off by 1e-6. FINITE: so is b."""
    out = ()
    for i in tl.static_range(len(a)):
        z = (1.0 - part) * a[i] + part * b[i]
        if not FINITE:
            z = tl.where(part == 0.0, a[i], z)
        out = out + (z,)
    return out


@triton.jit
def moved(at, step):
    """Addresses ``step`` elements further on."""
    out = ()
    for i in tl.static_range(len(at)):
        to = at[i] + step
        if to.shape[0] > 1:
            to = tl.multiple_of(tl.max_contiguous(to, [1, 2]), [1, 1])
        out = out + (to,)
    return out


@triton.jit
def load_between(network, c, classes, columns, left, right):
    """A coarse row interpolated horizontally, from the addresses of its pixels' neighbours."""
    out = ()
    for i in tl.static_range(len(c)):
        a, b = load_at(network, c[i], classes, left[i]), load_at(network, c[i], classes, right[i])
        out = out + ((1.0 - columns.part)[None, :] * a + columns.part[None, :] * b,)
    return out


@triton.jit
def load_band(network, c, classes, pixels, columns, grid, ALIGN: tl.constexpr, DIRECT: tl.constexpr):
    """Both coarse rows around a band, interpolated horizontally; a network that has the loss grid: its row, twice.

    A loop of two rounds that carries addresses, not two calls: for each access whose addresses are formed beside it
    Triton looks through the whole kernel, once for each of its operations, and that is most of a compilation.
    """
    first = tl.minimum(pixels.begin, grid.height - 1)
    if DIRECT:
        z = load_row(network, c, classes, pixels.image, first, pixels.x)
        return z, z
    else:
        height = shown(network.height)
        row = lower(first, height, grid.height, ALIGN)
        step = tl.where(row + 1 < height, shown(network.stride_h), 0)
        left = addresses(network, c, pixels.image, row, columns.left)
        right = addresses(network, c, pixels.image, row, columns.right)
        above = zeros(c, pixels)
        below = above
        for _ in range(2):
            below = above
            above = load_between(network, c, classes, columns, left, right)
            left, right = moved(left, step), moved(right, step)
        return below, above


@triton.jit
def logits_of(band, f, DIRECT: tl.constexpr, FINITE: tl.constexpr = False):
    """Blocks of logits ``f`` of the way between a band's rows. FINITE: no logit is infinite."""
    if DIRECT:
        return band[0]
    else:
        return between(band[0], band[1], f, FINITE)


@triton.jit
def load_labels(labels, pixels, y, classes, SAMPLED: tl.constexpr):
    """A row's labels (-1 where ignored or wrong), whether pixels are valid, and whether their label is wrong.

    SAMPLED: by nearest neighbour, in float32 as F.interpolate does.
    """
    column = pixels.x
    if SAMPLED:
        y = tl.minimum((tl.cast(y, tl.float32) * labels.rows_scale).to(tl.int32), labels.height - 1)
        column = tl.minimum((column.to(tl.float32) * labels.columns_scale).to(tl.int32), labels.width - 1)
    row = labels.data + pixels.image * labels.stride_b + tl.cast(y, tl.int64) * labels.stride_h
    label = tl.load(row + column.to(tl.int64) * labels.stride_w).to(tl.int64)
    counts = pixels.inside & (label != labels.ignore_index)
    wrong = counts & ((label < 0) | (label >= classes))
    valid = counts & (wrong == 0)
    return tl.where(valid, label, -1).to(tl.int32), valid, wrong


@triton.jit
def pixel_factor(upstream, pixels, y, UPSTREAM: tl.constexpr):
    factor = tl.full(pixels.x.shape, 1.0, tl.float32)
    if UPSTREAM:
        row = upstream.data + pixels.image * shown(upstream.stride_b) + tl.cast(y, tl.int64) * shown(upstream.stride_h)
        factor = tl.load(row + pixels.x.to(tl.int64) * upstream.stride_w).to(tl.float32)
    return factor


# Gradients out -------------------------------------------------------------------------------------------------


@triton.jit
def masked(g, valid):
    """0 where a pixel is ignored: a NaN that only such pixels reach counts for nothing."""
    out = ()
    for i in tl.static_range(len(g)):
        out = out + (tl.where(valid[None, :], g[i], 0.0),)
    return out


@triton.jit
def store_row(network, c, classes, pixels, y, grid, g):
    """The gradient of a row of a network that has the loss grid."""
    for i in tl.static_range(len(c)):
        row = ((pixels.image * classes + c[i]) * grid.height + y) * grid.width
        inside = (c[i] < classes) & pixels.inside[None, :]
        at = network.gradient + row + pixels.x[None, :]
        if c[i].shape[0] > 1:
            at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])
        tl.store(at, g[i], mask=inside)
