"""Cross-entropy and logit distillation per pixel in Triton (docs/mathematics.md, section 7), right for any logit.

Blocks of classes: see pixel_math.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixel_math import (
    best_class,
    exp_nonpositive,
    highest,
    is_class,
    log_total,
    numerators,
    others,
    pick,
    surprise,
    value_of,
    where_mass,
)


@triton.jit
def cross_entropy_row(
    o, c, classes, label, class_weight, weight_sum, smoothing, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr
):
    """Cross-entropy of section 7 and the blocks of its gradient. ``class_weight``: blocks [classes, 1], 0 beyond K; 1
    within without HAS_WEIGHT. SMOOTH: whether there is label smoothing."""
    labelled = is_class(c, label)
    m = highest(o)
    student = ()
    for i in tl.static_range(len(o)):
        student = student + (exp_nonpositive(o[i] - m[None, :]),)
    at_label, rest = pick(student, labelled), others(student, labelled)
    o_label = pick(o, labelled)
    label_weight, smoothed = tl.zeros_like(m) + 1.0, tl.zeros_like(m)
    if HAS_WEIGHT:
        full_weight = ()
        for i in tl.static_range(len(o)):
            full_weight = full_weight + (class_weight[i] + tl.zeros_like(o[i]),)
        label_weight = pick(full_weight, labelled)
    if SMOOTH:
        for i in tl.static_range(len(o)):
            smoothed += tl.sum(where_mass(class_weight[i], o_label[None, :] - o[i]), 0)
    task, factors = finish_cross_entropy(
        at_label, rest, m - o_label, smoothed, label_weight, weight_sum, smoothing / classes, smoothing, SMOOTH
    )
    gradient = ()
    for i in tl.static_range(len(o)):
        gradient = gradient + (cross_entropy_block(student[i], class_weight[i], labelled[i], factors, SMOOTH),)
    return task, gradient


@triton.jit
def finish_cross_entropy(
    at_label, rest, distance, smoothed, label_weight, weight_sum, share, smoothing, SMOOTH: tl.constexpr
):
    """A pixel's cross-entropy and the factors of its gradient, from e^{o - m} of the label and the others' sum;
    ``smoothed`` is sum_c w_c (o_y - o_c), ``share`` the label smoothing of one class."""
    nll = surprise(at_label, rest, distance)
    inverse = 1.0 / (at_label + rest)
    error = -rest * inverse  # p_y - 1, without the cancellation
    hard = label_weight
    if SMOOTH:
        hard *= 1.0 - smoothing
    task, label_gradient, factor = where_mass(hard, nll), hard * error, hard
    if SMOOTH:
        # A label that is switched off is infinitely far from the others, too: inf - inf.
        task += share * tl.where(nll == float("inf"), nll, weight_sum * nll + smoothed)
        label_gradient += share * (weight_sum * (1.0 + error) - label_weight)
        factor += share * weight_sum
    return task, (inverse * factor, label_gradient, share)


@triton.jit
def cross_entropy_block(student, class_weight, labelled, factors, SMOOTH: tl.constexpr):
    g = student * factors[0][None, :]
    if SMOOTH:
        g -= factors[2] * class_weight
    return tl.where(labelled, factors[1][None, :], g)


@triton.jit
def distillation_row(o_s, o_t, c, temperature):
    """T^2 KL(softmax(o^t / T) || softmax(o^s / T)) of section 7 and the blocks of its gradient."""
    cold = 1.0 / temperature
    anchor = is_class(c, best_class(o_t, c))
    m_s, m_t = highest(o_s), highest(o_t)
    student, teacher = numerators(o_s, m_s, cold), numerators(o_t, m_t, cold)
    s_anchor, s_others = pick(student, anchor), others(student, anchor)
    t_anchor, t_others = pick(teacher, anchor), others(teacher, anchor)
    value = tl.zeros_like(m_s)
    for i in tl.static_range(len(c)):
        value += tl.sum(where_mass(teacher[i], value_of(o_s[i], m_s, o_t[i], m_t, False)), 0)
    kd, factors = finish_distillation((s_anchor, s_others), (t_anchor, t_others), value, temperature)
    gradient = ()
    for i in tl.static_range(len(c)):
        gradient = gradient + (distillation_block(student[i], teacher[i], anchor[i], factors, temperature),)
    return kd, gradient


@triton.jit
def finish_distillation(student, teacher, value, temperature):
    """A pixel's divergence and the factors of its gradient, of e^{(o - m) / T} in pairs: the anchor's, the others' sum.

    ``value``: the sum over all classes of e^{(o^t - m) / T} v, see :func:`value_of`.
    """
    cold = 1.0 / temperature
    log_ratio = log_total(student[0], student[1]) - log_total(teacher[0], teacher[1])
    s_inverse, t_inverse = 1.0 / (student[0] + student[1]), 1.0 / (teacher[0] + teacher[1])
    kd = temperature * temperature * (value * t_inverse * cold + log_ratio)
    return kd, (s_inverse, t_inverse, teacher[1] * t_inverse - student[1] * s_inverse)


@triton.jit
def distillation_block(student, teacher, anchor, factors, temperature):
    g = student * factors[0][None, :] - teacher * factors[1][None, :]
    return tl.where(anchor, factors[2][None, :], g) * temperature
