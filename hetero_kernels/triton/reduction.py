"""What turns per-pixel terms into a loss (docs/mathematics.md, section 8).

Before the main launch the divisors, where it must know them; at its end a program's slots (see tile.py) and sums; after
it, in one launch, slots become coarse gradients and the programs' sums the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import Pixels, band_of, first_pixel, grid_of, labels_of, load_labels, lower, normalized, shown


class Term(NamedTuple):
    """One of a loss's two terms: its weight, its share of a sum without divisor, the ``parts`` numbers whose sum is its
    divisor (of a :func:`divisors_kernel` both terms' rows)."""

    weight: Any
    share: Any
    divisor: Any
    parts: Any


class Output(NamedTuple):
    partial: Any  # [2, programs]: sums of both terms
    count: Any  # number of valid pixels, int64, or None where nobody asks
    first: Any  # maps [B, loss grid] of both terms, or None
    second: Any


@triton.jit
def store_maps(output, pixels, y, grid, first, second, MAPS: tl.constexpr):
    if MAPS:
        at = (pixels.image * grid.height + y) * grid.width + pixels.x
        tl.store(output.first + at, first, mask=pixels.inside)
        tl.store(output.second + at, second, mask=pixels.inside)


@triton.jit
def store_sums(output, program, first, second, valid):
    tl.store(output.partial + program, tl.sum(first, 0))
    tl.store(output.partial + tl.num_programs(0) + program, tl.sum(second, 0))
    if output.count is not None:
        tl.atomic_add(output.count, tl.sum(valid, 0).to(tl.int64), sem="relaxed")


@triton.jit
def inverse_divisor(term, ROW: tl.constexpr, PARTS: tl.constexpr):
    """1 / a term's divisor, 0 where that is 0; 1 where PARTS is 0. ROW: which term it is."""
    inverse = 1.0
    if PARTS > 0:
        i = tl.arange(0, PARTS)
        row = term.divisor
        if PARTS > 1:
            row += ROW * PARTS
        d = tl.sum(tl.load(row + i, mask=i < shown(term.parts), other=0.0).to(tl.float32), 0)
        inverse = tl.where(d == 0.0, 0.0, 1.0 / d)
    return inverse


@triton.jit
def term_scale(term, ROW: tl.constexpr, PARTS: tl.constexpr):
    """What a term's value at a pixel is multiplied by: its weight, its share, 1 / its divisor."""
    return term.weight * term.share * inverse_divisor(term, ROW, PARTS)


@triton.jit(do_not_specialize=["images", "height", "width"])
def divisors_kernel(
    labels, class_weight, parts, images, height, width, classes,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, SAMPLED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Divisors that the main launch must know: a program's part of each term's, to ``parts`` [2, PARTS]. The second is
    the number of valid pixels, and so is the first unless there are class weights to add up. The loss grid is
    [images, height, width]."""
    labels = labels_of(labels)
    size = height * width
    tiles = tl.cdiv(size, BLOCK)
    number, weights = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.program_id(0), images * tiles, tl.num_programs(0)):
        n = tile % tiles * BLOCK + tl.arange(0, BLOCK)
        at = tl.minimum(n, size - 1)
        pixels = Pixels(tl.cast(tile // tiles, tl.int64), 0, 0, 0, at % width, n < size)
        label, valid, _ = load_labels(labels, pixels, at // width, classes, SAMPLED)
        number += valid.to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(class_weight + label, mask=valid, other=0.0)
            weights += w.to(tl.float32)
    count = tl.sum(number, 0)
    first = count
    if HAS_WEIGHT:
        first = tl.sum(weights, 0)
    tl.store(parts + tl.program_id(0), first)
    tl.store(parts + PARTS + tl.program_id(0), count)


@triton.jit
def slot_weights(columns, start, SPAN: tl.constexpr):
    """Weights [pixels, SPAN] of a slot's columns from ``start`` on."""
    column = (columns.first + start + tl.arange(0, SPAN))[None, :]
    weights = tl.where(columns.left[:, None] == column, (1.0 - columns.part)[:, None], 0.0)
    return weights + tl.where(columns.right[:, None] == column, columns.part[:, None], 0.0)


@triton.jit
def slot_addresses(to, span, c, classes, SPAN: tl.constexpr):
    """Where a block of a slot's two coarse rows begins."""
    lower_row = to + c * span + tl.arange(0, SPAN)[None, :]
    return lower_row, lower_row + classes * span


@triton.jit
def store_block(at, span, c, classes, below, above, weights, start, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """A block of both coarse rows; returns the addresses of the columns after them."""
    inside = (c < classes) & (start + tl.arange(0, SPAN)[None, :] < span)
    tl.store(at[0], tl.dot(below, weights, input_precision=PRECISION), mask=inside)
    tl.store(at[1], tl.dot(above, weights, input_precision=PRECISION), mask=inside)
    return at[0] + SPAN, at[1] + SPAN


@triton.jit
def store_slot(network, c, classes, columns, slot, gradient, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """Adjoint of horizontal interpolation: gradients of a band's two coarse rows at the tile's pixels, to a slot.
    Addresses are carried from round to round, see :func:`load_band`."""
    span = shown(network.span)
    to = network.gradient + tl.cast(slot, tl.int64) * 2 * classes * span
    below, above = gradient
    if c[0].shape[0] <= 8:  # weights once, for they are the larger operand
        at = ()
        for i in tl.static_range(len(c)):
            at = at + (slot_addresses(to, span, c[i], classes, SPAN),)
        for start in range(0, span, SPAN):
            weights = slot_weights(columns, start, SPAN)
            after = ()
            for i in tl.static_range(len(c)):
                next_at = store_block(
                    at[i], span, c[i], classes, below[i], above[i], weights, start, SPAN, PRECISION
                )  # fmt: skip
                after = after + (next_at,)
            at = after
    else:  # one block at a time, or the operands of all would take shared memory together
        for i in tl.static_range(len(c)):
            at = slot_addresses(to, span, c[i], classes, SPAN)
            for start in range(0, span, SPAN):
                weights = slot_weights(columns, start, SPAN)
                at = store_block(at, span, c[i], classes, below[i], above[i], weights, start, SPAN, PRECISION)


@triton.jit
def add_slots(
    network, grid, classes, image, row, k, n, reach,
    TILE: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS classes, COLUMNS coarse columns] of a coarse row of a gradient, from all the slots that reach them. A
    coarse column is within ``reach`` tiles."""
    height, width, span = shown(network.height), shown(network.width), shown(network.span)
    inside = (k < classes) & (n < width)
    first_tile = first_pixel(n - 1, width, grid.width, ALIGN) // TILE
    end = tl.where(n + 1 >= width, grid.width, first_pixel(n + 1, width, grid.width, ALIGN))
    last_tile = (end - 1) // TILE
    side = classes * span
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    for cell in range(tl.maximum(row - 1, 0), row + 1):  # bands whose lower coarse row is this one or the one before
        from_row = first_pixel(cell, height, grid.height, ALIGN)
        to_row = tl.where(cell + 1 >= height, grid.height, first_pixel(cell + 1, height, grid.height, ALIGN))
        end_band = band_of(tl.maximum(to_row - 1, 0), grid, ALIGN, SAME) + 1
        first_band = tl.where(from_row < to_row, band_of(from_row, grid, ALIGN, SAME), end_band)
        below = tl.where(cell == row, 1.0, 0.0)
        above = tl.where((cell < row) | (row == height - 1), 1.0, 0.0)
        for band in range(first_band, end_band):
            for split in range(grid.splits):
                for step in range(reach):
                    tile = first_tile + step
                    at = n - lower(tile * TILE, width, grid.width, ALIGN)
                    ok = inside & (tile <= last_tile) & (at >= 0) & (at < span)
                    slot = ((image * grid.bands + band) * grid.splits + split) * grid.tiles + tile
                    lower_row = network.gradient + slot * 2 * side + k * span + at
                    lower_row = tl.multiple_of(tl.max_contiguous(lower_row, [1, 2]), [1, 1])  # see tile.py
                    upper_row = tl.multiple_of(tl.max_contiguous(lower_row + side, [1, 2]), [1, 1])
                    g += below * tl.load(lower_row, mask=ok, other=0.0)
                    g += above * tl.load(upper_row, mask=ok, other=0.0)
    return g


@triton.jit
def by_raw(network, g, image, row, k, n, classes, inside, part):
    """The gradient of raw logits from that of what they mean; stores a ``part`` of scale's and shift's. A pixel without
    a gradient counts 0, whatever its logit."""
    start = network.logits + image * shown(network.stride_b) + tl.cast(row, tl.int64) * shown(network.stride_h)
    at = start + tl.cast(k, tl.int64) * shown(network.stride_c) + tl.cast(n, tl.int64) * network.stride_w
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if network.floor is not None:
        g = tl.where(normalized(network, k, classes, z) <= network.floor, 0.0, g)
    reached = g != 0.0
    sums = network.sums + part * 2 * classes + k
    tl.store(sums, tl.sum(tl.where(reached, g * z, 0.0), 1)[:, None], mask=k < classes)
    tl.store(sums + classes, tl.sum(g, 1)[:, None], mask=k < classes)
    return tl.where(reached, g * tl.load(network.scale + k, mask=k < classes, other=0.0), 0.0)


@triton.jit
def offset_of(network, classes, image, row, k, n):
    """Of classes ``k`` and columns ``n`` of a coarse row in a gradient [B, K, h, w]."""
    return ((image * classes + k) * shown(network.height) + row) * shown(network.width) + n


@triton.jit
def gather(
    out, network, grid, classes, program, scale, reach, DIRECT: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program of one network: [ROWS classes, COLUMNS coarse columns] of a coarse row of its gradient."""
    height, width = shown(network.height), shown(network.width)
    column_blocks, class_blocks = tl.cdiv(width, COLUMNS), tl.cdiv(classes, ROWS)
    column = program % column_blocks
    n = (column * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    program = program // column_blocks
    k = (program % class_blocks * ROWS + tl.arange(0, ROWS))[:, None]
    program = program // class_blocks
    row, image = program % height, (program // height).to(tl.int64)
    inside = (k < classes) & (n < width)
    if DIRECT:
        g = tl.load(network.gradient + offset_of(network, classes, image, row, k, n), mask=inside, other=0.0)
    else:
        g = add_slots(network, grid, classes, image, row, k, n, reach, TILE, ALIGN, SAME, ROWS, COLUMNS)
    g *= scale
    if network.scale is not None:
        part = (image * height + row) * column_blocks + column
        g = by_raw(network, g, image, row, k, n, classes, inside, part)
    # Only now: what is known before the loop over slots is kept in registers through it.
    tl.store(out + offset_of(network, classes, image, row, k, n), g, mask=inside)


@triton.jit
def store_loss(
    partial, terms, loss, first, second, programs, inverse,
    MODES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both terms and the loss from the programs' sums; ``inverse``: of the number of valid pixels."""
    sum_0, sum_1 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sum_0 += tl.load(partial + i, mask=i < programs, other=0.0).to(tl.float64)
        sum_1 += tl.load(partial + programs + i, mask=i < programs, other=0.0).to(tl.float64)
    value_0, value_1 = tl.sum(sum_0, 0).to(tl.float32), tl.sum(sum_1, 0).to(tl.float32)
    value_0 *= inverse if MODES[0] == "count" else inverse_divisor(terms[0], 0, PARTS[0])
    value_1 *= inverse if MODES[1] == "count" else inverse_divisor(terms[1], 1, PARTS[1])
    value_0 *= terms[0].share
    value_1 *= terms[1].share
    tl.store(first, value_0)
    tl.store(second, value_1)
    tl.store(loss, terms[0].weight * value_0 + terms[1].weight * value_1)


@triton.jit
def inverse_count(count, WANTED: tl.constexpr):
    """1 / the number of valid pixels, 0 where there is none; 1 where it is not wanted."""
    inverse = 1.0
    if WANTED:
        n = tl.load(count).to(tl.float32)
        inverse = tl.where(n == 0.0, 0.0, 1.0 / n)
    return inverse


NUMBERS = ["classes", "programs", "student_programs", "student_reach", "teacher_reach"]


@triton.jit(do_not_specialize=NUMBERS)
def finish_kernel(
    student, teacher, student_out, teacher_out, grid, partial, count, terms, loss, first, second, classes, programs,
    student_programs, student_reach, teacher_reach,
    MODES: tl.constexpr, PARTS: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr, DEFERRED: tl.constexpr, LOSS: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program finishes the loss (LOSS), whose sums are the longest chain of loads, so that it is done before
    the others; then come ``student_programs`` that finish the student's gradient, then the teacher's.

    DEFERRED: gradients still lack the number of valid pixels, ``count``, as divisor. MODES: what divides a term,
    "count", "given" (its divisor) or "one".
    """
    grid = grid_of(grid)
    program = tl.program_id(0)
    if LOSS:
        program -= 1
    inverse = inverse_count(count, DEFERRED or MODES[0] == "count" or MODES[1] == "count")
    scale = 1.0
    if DEFERRED:
        scale = inverse
    if program < 0:
        if LOSS:
            store_loss(partial, terms, loss, first, second, programs, inverse, MODES, PARTS, BLOCK)
    elif program < student_programs:
        if STUDENT:
            gather(
                student_out, student, grid, classes, program, scale, student_reach, STUDENT_DIRECT,
                TILE, ALIGN, SAME, ROWS, COLUMNS,
            )  # fmt: skip
    else:
        if TEACHER:
            gather(
                teacher_out, teacher, grid, classes, program - student_programs, scale, teacher_reach, TEACHER_DIRECT,
                TILE, ALIGN, SAME, ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def sum_parts_kernel(parts, out, count, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """``out`` [columns]: sums of the ``count`` rows of ``parts``, in an order that is always the same."""
    j = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    sums = tl.zeros([PARTS, COLUMNS], tl.float64)
    for start in range(0, count, PARTS):
        i = (start + tl.arange(0, PARTS))[:, None]
        sums += tl.load(parts + tl.cast(i, tl.int64) * columns + j, mask=(i < count) & (j < columns), other=0.0)
    tl.store(out + j, tl.sum(sums, 0)[None, :].to(tl.float32), mask=j < columns)
