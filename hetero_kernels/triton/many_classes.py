"""The pixel losses for more classes than registers hold: loops over blocks of classes, with online normalisers.

What a program keeps does not grow with K. Its pixels are a block of several rows of a band. Their logits are
interpolated anew in each of three visits: the first finds every pixel's anchor, the second adds up, the third forms the
gradient. The mathematics is the guarded one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hakd_math import evaluate, finish, gradient_block, mix
from .pixel_math import LOWEST, PADDING, best_class, exp_nonpositive, numerators, others, value_of, where_mass
from .reduction import store_maps, store_slot, store_sums, term_scale
from .segmentation_math import (
    cross_entropy_block,
    distillation_block,
    finish_cross_entropy,
    finish_distillation,
)
from .tile import (
    Pixels,
    columns_of,
    fraction,
    grid_of,
    labels_of,
    load_block,
    load_labels,
    load_per_class,
    locate,
    lower,
    masked,
    meant,
    pixel_factor,
    shown,
    store_row,
)


class Site(NamedTuple):
    """Where a program's pixels are on a network's grid."""

    row: Any  # the band's lower coarse row
    part: Any  # of each pixel, the weight of the other row
    columns: Any


@triton.jit
def locate_block(program, grid, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr):
    """What a program owns, as one block of pixels, and each one's row."""
    rows = locate(program, grid, TILE, ROWS, ALIGN, SAME)
    i = tl.arange(0, TILE * ROWS)
    x, y = rows.first + i % TILE, rows.begin + i // TILE
    inside = (x < grid.width) & (y < rows.end)
    x, y = tl.minimum(x, grid.width - 1), tl.minimum(y, grid.height - 1)
    return Pixels(rows.image, rows.begin, rows.end, rows.first, x, inside), y


@triton.jit
def site_of(network, pixels, y, grid, ALIGN: tl.constexpr):
    height = shown(network.height)
    row = lower(tl.minimum(pixels.begin, grid.height - 1), height, grid.height, ALIGN)
    part = fraction(y, row, height, grid.height, ALIGN)
    return Site(row, part, columns_of(pixels, network, grid, ALIGN))


@triton.jit
def load_pixels(network, c, classes, pixels, y, site, DIRECT: tl.constexpr):
    """Logits of classes ``c``: [classes, 1], or [1, pixels] for a class of every pixel's own; ``PADDING`` beyond K."""
    if DIRECT:
        at = network.logits + pixels.image * shown(network.stride_b) + tl.cast(y, tl.int64) * shown(network.stride_h)
        at += tl.cast(pixels.x, tl.int64) * network.stride_w
        at = at[None, :] + tl.cast(c, tl.int64) * shown(network.stride_c)
        if c.shape[0] > 1:
            at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])  # see tile.py
        z = meant(network, c, classes, tl.load(at, mask=c < classes, other=0.0).to(tl.float32))
        z += tl.where(c < classes, 0.0, PADDING)
    else:
        left, right, part = site.columns.left, site.columns.right, site.columns.part[None, :]
        above_row = tl.minimum(site.row + 1, shown(network.height) - 1)
        below = (1.0 - part) * load_block(network, c, classes, pixels.image, site.row, left)
        below += part * load_block(network, c, classes, pixels.image, site.row, right)
        above = (1.0 - part) * load_block(network, c, classes, pixels.image, above_row, left)
        above += part * load_block(network, c, classes, pixels.image, above_row, right)
        part = site.part[None, :]
        z = tl.where(part == 0.0, below, (1.0 - part) * below + part * above)  # which may be infinite
    return z


@triton.jit
def visited(pixels, classes):
    """The classes, or none at all where a program has no row: some bands are less tall than others."""
    return tl.where(pixels.begin < pixels.end, classes, 0)


@triton.jit
def best_of_all(network, classes, pixels, y, site, CLASSES: tl.constexpr, DIRECT: tl.constexpr):
    """First visit: each pixel's best class and its logit."""
    best = tl.zeros(pixels.x.shape, tl.int32)
    highest = tl.full(pixels.x.shape, float("-inf"), tl.float32)
    for start in range(0, visited(pixels, classes), CLASSES):
        c = (start + tl.arange(0, CLASSES))[:, None]
        z = load_pixels(network, c, classes, pixels, y, site, DIRECT)
        m = tl.max(z, 0)
        best = tl.where(m > highest, best_class((z,), (c,)), best)
        highest = tl.maximum(highest, m)
    return best, highest


@triton.jit
def store_gradient(
    network, c, classes, pixels, y, site, program, grid, g, valid, SPAN: tl.constexpr, PRECISION: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """A block of classes: where it belongs, or to its slot."""
    g = masked((g,), valid)
    if DIRECT:
        store_row(network, (c,), classes, pixels, y[None, :], grid, g)
    else:
        rows = ((g[0] * (1.0 - site.part)[None, :],), (g[0] * site.part[None, :],))
        store_slot(network, (c,), classes, site.columns, program, rows, SPAN, PRECISION)


@triton.jit
def measures(spatial_sums, pixels, c, classes, KEM: tl.constexpr):
    """What kem="spatial" measures scores of classes ``c`` by, see ``evaluate``."""
    spatial = ((c,), (c,))
    if KEM == "spatial":
        sums = spatial_sums + pixels.image * 2 * classes
        spatial = (load_per_class(sums, (c,), classes), load_per_class(sums + classes, (c,), classes))
    return spatial


@triton.jit
def hakd_many_kernel(
    student, teacher, labels, upstream, grid, hakd_term, proj_term, spatial_sums, output, classes, temperature,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr,
    STUDENT_SPAN: tl.constexpr, TEACHER_SPAN: tl.constexpr, PRECISION: tl.constexpr,
    KMM: tl.constexpr, KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr, SAMPLED: tl.constexpr,
    UPSTREAM: tl.constexpr, MAPS: tl.constexpr, HAKD_PARTS: tl.constexpr, PROJ_PARTS: tl.constexpr,
):  # fmt: skip
    """``hakd_kernel`` for any number of classes."""
    labels, grid = labels_of(labels), grid_of(grid)
    program = tl.program_id(0)
    CLASSES: tl.constexpr = BLOCKS[0]
    pixels, y = locate_block(program, grid, TILE, ROWS, ALIGN, SAME)
    s_site, t_site = site_of(student, pixels, y, grid, ALIGN), site_of(teacher, pixels, y, grid, ALIGN)
    label, valid, wrong = load_labels(labels, pixels, y, classes, SAMPLED)
    factor = pixel_factor(upstream, pixels, y, UPSTREAM)
    hakd_scale = term_scale(hakd_term, 0, HAKD_PARTS)
    proj_scale = term_scale(proj_term, 1, PROJ_PARTS)
    hakd_factor, proj_factor = factor * hakd_scale, factor * (proj_scale / classes)
    cold = 1.0 / temperature

    if KMM:
        best, _ = best_of_all(student, classes, pixels, y, s_site, CLASSES, STUDENT_DIRECT)
    else:
        best, _ = best_of_all(teacher, classes, pixels, y, t_site, CLASSES, TEACHER_DIRECT)
    a = best[None, :]
    a_s = load_pixels(student, a, classes, pixels, y, s_site, STUDENT_DIRECT)
    a_t = load_pixels(teacher, a, classes, pixels, y, t_site, TEACHER_DIRECT)
    a_both, a_h, a_score = mix((a_s,), (a_t,), (a == label[None, :],), KMM)
    # Maxima start at the anchor; each block's may raise them, which rescales what was added up before. Never at -inf,
    # which has no distance from itself.
    s_at, h_at = tl.sum(a_s, 0), tl.sum(a_h[0], 0)
    m_s, m_h, m_q = tl.maximum(s_at, LOWEST), tl.maximum(h_at, LOWEST), tl.sum(a_score[0], 0)
    s_others, weight_sum = tl.zeros(pixels.x.shape, tl.float32), tl.zeros(pixels.x.shape, tl.float32)
    h_others, w_others, v_others, reliabilities = s_others, s_others, s_others, s_others
    for start in range(0, visited(pixels, classes), CLASSES):
        c = (start + tl.arange(0, CLASSES))[:, None]
        anchor = (c == a,)
        z_s = load_pixels(student, c, classes, pixels, y, s_site, STUDENT_DIRECT)
        z_t = load_pixels(teacher, c, classes, pixels, y, t_site, TEACHER_DIRECT)
        both, z_h, score = mix((z_s,), (z_t,), (c == label[None, :],), KMM)
        reliabilities += both
        now_s, now_h = tl.maximum(m_s, tl.max(z_s, 0)), tl.maximum(m_h, tl.max(z_h[0], 0))
        now_q = tl.maximum(m_q, tl.max(score[0], 0))
        s_scale, h_scale = exp_nonpositive((m_s - now_s) * cold), exp_nonpositive((m_h - now_h) * cold)
        q_scale = exp_nonpositive(m_q - now_q)
        rise = now_s - m_s  # of every v so far
        if not CE:
            rise -= now_h - m_h
        m_s, m_h, m_q = now_s, now_h, now_q
        hybrid = numerators(z_h, m_h, cold)
        weight = evaluate(score, m_q, (c,), classes, measures(spatial_sums, pixels, c, classes, KEM), KEM)
        weighted = hybrid[0] * weight[0]
        w_scale = h_scale
        if KEM == "class":
            w_scale *= q_scale
        v = value_of(z_s, m_s, z_h[0], m_h, CE)
        v_others = (v_others + w_others * rise) * w_scale + others((where_mass(weighted, v),), anchor)
        w_others = w_others * w_scale + others((weighted,), anchor)
        s_others = s_others * s_scale + others(numerators((z_s,), m_s, cold), anchor)
        h_others = h_others * h_scale + others(hybrid, anchor)
        weight_sum = weight_sum * q_scale + tl.sum(weight[0], 0)

    a_weight = evaluate(a_score, m_q, (a,), classes, measures(spatial_sums, pixels, a, classes, KEM), KEM)
    s_anchor, h_anchor = exp_nonpositive((s_at - m_s) * cold), exp_nonpositive((h_at - m_h) * cold)
    w_anchor = h_anchor * tl.sum(a_weight[0], 0)
    value = v_others + where_mass(w_anchor, tl.sum(value_of(a_s, m_s, a_h[0], m_h, CE), 0))
    hakd, factors = finish(
        (s_anchor, s_others), (h_anchor, h_others), (w_anchor, w_others), value, weight_sum, temperature, hakd_factor,
        KEM, CE,
    )  # fmt: skip
    proj, nothing = reliabilities / classes, tl.where(wrong, float("nan"), 0.0)
    hakd, proj = tl.where(valid, hakd, nothing), tl.where(valid, proj, nothing)
    store_maps(output, pixels, y, grid, hakd, proj, MAPS)
    store_sums(output, program, hakd, proj, valid.to(tl.int32))

    if STUDENT or TEACHER:
        for start in range(0, classes, CLASSES):
            c = (start + tl.arange(0, CLASSES))[:, None]
            labelled = c == label[None, :]
            z_s = load_pixels(student, c, classes, pixels, y, s_site, STUDENT_DIRECT)
            z_t = load_pixels(teacher, c, classes, pixels, y, t_site, TEACHER_DIRECT)
            both, z_h, score = mix((z_s,), (z_t,), (labelled,), KMM)
            weight = evaluate(score, m_q, (c,), classes, measures(spatial_sums, pixels, c, classes, KEM), KEM)
            weighted = numerators(z_h, m_h, cold)[0] * weight[0]
            numerator = numerators((z_s,), m_s, cold)[0]
            g, t = gradient_block(numerator, weighted, z_s, z_t, c == a, labelled, factors, proj_factor, PROJ)
            if STUDENT:
                store_gradient(
                    student, c, classes, pixels, y, s_site, program, grid, g, valid, STUDENT_SPAN, PRECISION,
                    STUDENT_DIRECT,
                )  # fmt: skip
            if TEACHER:
                store_gradient(
                    teacher, c, classes, pixels, y, t_site, program, grid, t, valid, TEACHER_SPAN, PRECISION,
                    TEACHER_DIRECT,
                )  # fmt: skip


@triton.jit
def load_weight(class_weight, c, classes, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        weight = load_per_class(class_weight, (c,), classes)[0]
    else:
        weight = tl.where(c < classes, 1.0, 0.0)
    return weight


@triton.jit
def segmentation_many_kernel(
    student, teacher, labels, upstream, grid, task_term, kd_term, class_weight, output, classes, temperature,
    smoothing,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, SAME: tl.constexpr,
    STUDENT: tl.constexpr, STUDENT_DIRECT: tl.constexpr, TEACHER_DIRECT: tl.constexpr, STUDENT_SPAN: tl.constexpr,
    PRECISION: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    UPSTREAM: tl.constexpr, MAPS: tl.constexpr, TASK_PARTS: tl.constexpr, KD_PARTS: tl.constexpr,
):  # fmt: skip
    """``segmentation_kernel`` for any number of classes."""
    labels, grid = labels_of(labels), grid_of(grid)
    program = tl.program_id(0)
    CLASSES: tl.constexpr = BLOCKS[0]
    pixels, y = locate_block(program, grid, TILE, ROWS, ALIGN, SAME)
    s_site, t_site = site_of(student, pixels, y, grid, ALIGN), site_of(teacher, pixels, y, grid, ALIGN)
    label, valid, wrong = load_labels(labels, pixels, y, classes, False)
    factor = pixel_factor(upstream, pixels, y, UPSTREAM)
    task_scale = term_scale(task_term, 0, TASK_PARTS)
    kd_scale = term_scale(kd_term, 1, KD_PARTS)
    cold, share = 1.0 / temperature, smoothing / classes

    best, m_s = best_of_all(student, classes, pixels, y, s_site, CLASSES, STUDENT_DIRECT)
    at_label = tl.maximum(label, 0)[None, :]
    o_label = tl.sum(load_pixels(student, at_label, classes, pixels, y, s_site, STUDENT_DIRECT), 0)
    label_weight = tl.sum(load_weight(class_weight, at_label, classes, HAS_WEIGHT), 0)
    a_s, m_t = m_s, m_s
    if HAS_TEACHER:
        best, m_t = best_of_all(teacher, classes, pixels, y, t_site, CLASSES, TEACHER_DIRECT)
        a_s = tl.sum(load_pixels(student, best[None, :], classes, pixels, y, s_site, STUDENT_DIRECT), 0)
    rest, weight_sum = tl.zeros(pixels.x.shape, tl.float32), tl.zeros(pixels.x.shape, tl.float32)
    smoothed, s_others, t_others, value = rest, rest, rest, rest
    for start in range(0, visited(pixels, classes), CLASSES):
        c = (start + tl.arange(0, CLASSES))[:, None]
        o_s = load_pixels(student, c, classes, pixels, y, s_site, STUDENT_DIRECT)
        weight = load_weight(class_weight, c, classes, HAS_WEIGHT)
        rest += others((exp_nonpositive(o_s - m_s[None, :]),), (c == label[None, :],))
        if SMOOTH:
            smoothed += tl.sum(where_mass(weight, o_label[None, :] - o_s), 0)
            weight_sum += tl.sum(weight, 0)
        if HAS_TEACHER:
            o_t = load_pixels(teacher, c, classes, pixels, y, t_site, TEACHER_DIRECT)
            anchor = (c == best[None, :],)
            numerator = numerators((o_t,), m_t, cold)
            s_others += others(numerators((o_s,), m_s, cold), anchor)
            t_others += others(numerator, anchor)
            value += tl.sum(where_mass(numerator[0], value_of(o_s, m_s, o_t, m_t, False)), 0)

    numerator = exp_nonpositive(o_label - m_s)
    task, task_factors = finish_cross_entropy(
        numerator, rest, m_s - o_label, smoothed, label_weight, weight_sum, share, smoothing, SMOOTH
    )
    kd = tl.zeros(pixels.x.shape, tl.float32)
    if HAS_TEACHER:
        kd, kd_factors = finish_distillation(
            (exp_nonpositive((a_s - m_s) * cold), s_others), (tl.zeros_like(m_t) + 1.0, t_others), value, temperature
        )
    nothing = tl.where(wrong, float("nan"), 0.0)
    task, kd = tl.where(valid, task, nothing), tl.where(valid, kd, nothing)
    store_maps(output, pixels, y, grid, task, kd, MAPS)
    store_sums(output, program, task, kd, valid.to(tl.int32))

    if STUDENT:
        for start in range(0, classes, CLASSES):
            c = (start + tl.arange(0, CLASSES))[:, None]
            o_s = load_pixels(student, c, classes, pixels, y, s_site, STUDENT_DIRECT)
            weight = load_weight(class_weight, c, classes, HAS_WEIGHT)
            g = cross_entropy_block(
                exp_nonpositive(o_s - m_s[None, :]), weight, c == label[None, :], task_factors, SMOOTH
            ) * (factor * task_scale)[None, :]  # fmt: skip
            if HAS_TEACHER:
                o_t = load_pixels(teacher, c, classes, pixels, y, t_site, TEACHER_DIRECT)
                s, t = numerators((o_s,), m_s, cold)[0], numerators((o_t,), m_t, cold)[0]
                d = distillation_block(s, t, c == best[None, :], kd_factors, temperature)
                g += d * (factor * kd_scale)[None, :]
            store_gradient(
                student, c, classes, pixels, y, s_site, program, grid, g, valid, STUDENT_SPAN, PRECISION,
                STUDENT_DIRECT,
            )  # fmt: skip
