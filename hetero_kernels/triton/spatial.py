"""kem="spatial", whose weights need all of an image's scores first: two launches before the main one."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .hakd_math import mix
from .launch import Launch, LossGrid
from .pixel_math import exp_nonpositive, is_class
from .tile import (
    Labels,
    Network,
    class_numbers,
    columns_of,
    fraction,
    grid_of,
    labels_of,
    load_band,
    load_labels,
    locate,
    logits_of,
    lower,
    shown,
    zeros,
)
from .tuning import cdiv


@triton.jit
def scores_kernel(
    student, teacher, labels, grid, partial, classes,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr,
    STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr, KMM: tl.constexpr, SAMPLED: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """kem="spatial", first: a program's highest score m of every class (0 without pixels) and its sum of e^{q - m},
    to ``partial`` [programs, 2, K]. BLOCKS are those of ``CLASSES`` classes, of which there is a second axis of
    programs."""
    labels, grid = labels_of(labels), grid_of(grid)
    program = tl.program_id(0)
    pixels = locate(program, grid, TILE, ROWS, ALIGN, SAME)
    c = class_numbers(BLOCKS, tl.program_id(1) * CLASSES)
    first_row = tl.minimum(pixels.begin, grid.height - 1)
    s_height, t_height = shown(student.height), shown(teacher.height)
    s_row = lower(first_row, s_height, grid.height, ALIGN)
    t_row = lower(first_row, t_height, grid.height, ALIGN)
    s_columns, t_columns = columns_of(pixels, student, grid, ALIGN), columns_of(pixels, teacher, grid, ALIGN)
    s_band = load_band(student, c, classes, pixels, s_columns, grid, ALIGN, STUDENT_DIRECT)
    t_band = load_band(teacher, c, classes, pixels, t_columns, grid, ALIGN, TEACHER_DIRECT)
    highest, sums = zeros(c, pixels), zeros(c, pixels)
    for y in range(pixels.begin, pixels.end):
        label, valid, _ = load_labels(labels, pixels, y, classes, SAMPLED)
        s_f = fraction(y, s_row, s_height, grid.height, ALIGN)
        t_f = fraction(y, t_row, t_height, grid.height, ALIGN)
        z_s = logits_of(s_band, s_f, STUDENT_DIRECT)
        z_t = logits_of(t_band, t_f, TEACHER_DIRECT)
        _, _, score = mix(z_s, z_t, is_class(c, label), KMM)
        new_highest, new_sums = (), ()
        for i in tl.static_range(len(c)):
            q = tl.where(valid[None, :], score[i], 0.0)
            now = tl.maximum(highest[i], q)
            e = tl.where(valid[None, :], exp_nonpositive(q - now), 0.0)
            new_highest = new_highest + (now,)
            new_sums = new_sums + (sums[i] * exp_nonpositive(highest[i] - now) + e,)
        highest, sums = new_highest, new_sums
    out = partial + tl.cast(program, tl.int64) * 2 * classes
    for i in tl.static_range(len(c)):
        m = tl.max(highest[i], 1)[:, None]
        tl.store(out + c[i], m, mask=c[i] < classes)
        s = tl.sum(sums[i] * exp_nonpositive(highest[i] - m), 1)[:, None]
        tl.store(out + classes + c[i], s, mask=c[i] < classes)


@triton.jit(do_not_specialize=["parts"])
def combine_scores_kernel(partial, spatial_sums, parts, classes, PARTS: tl.constexpr, CLASSES: tl.constexpr):
    """kem="spatial", second: m and 1 / sum_n e^{q - m} of an image's classes, from its programs' ``parts``."""
    image = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CLASSES + tl.arange(0, CLASSES))[None, :]
    highest, sums = tl.zeros([PARTS, CLASSES], tl.float32), tl.zeros([PARTS, CLASSES], tl.float32)
    for start in range(0, parts, PARTS):
        i = (start + tl.arange(0, PARTS))[:, None]
        inside = (i < parts) & (c < classes)
        at = partial + (image * parts + i) * 2 * classes + c
        m = tl.load(at, mask=inside, other=0.0)
        now = tl.maximum(highest, m)
        s = tl.load(at + classes, mask=inside, other=0.0)
        sums = sums * exp_nonpositive(highest - now) + s * exp_nonpositive(m - now)
        highest = now
    m = tl.max(highest, 0)[None, :]
    s = tl.sum(sums * exp_nonpositive(highest - m), 0)[None, :]
    out = spatial_sums + image * 2 * classes + c
    tl.store(out, m, mask=c < classes)
    tl.store(out + classes, tl.where(s == 0.0, 0.0, 1.0 / s), mask=c < classes)


class SpatialScores:
    """What kem="spatial" measures an image's scores by, [B, 2, K], on a grid."""

    def __init__(self, grid: LossGrid, batch: int, classes: int, common: dict[str, Any]) -> None:
        together = sum(grid.tiling.blocks)
        self._grid, self._shape, self._programs = grid, (batch, 2, classes), grid.programs
        self._scores = Launch(scores_kernel, (grid.programs, cdiv(classes, together)), CLASSES=together, **common)
        self._combine = Launch(
            combine_scores_kernel, (batch, cdiv(classes, 8)), PARTS=64, CLASSES=8, num_warps=4
        )  # fmt: skip

    def __call__(self, aligned: bool, networks: tuple[Network, Network], labels: Labels, like: Tensor) -> Tensor:
        _, _, classes = self._shape
        partial, sums = like.new_empty(self._programs, 2, classes), like.new_empty(self._shape)
        self._scores(aligned, *networks, labels, self._grid.argument, partial, classes)
        self._combine(aligned, partial, sums, self._grid.parts, classes)
        return sums
