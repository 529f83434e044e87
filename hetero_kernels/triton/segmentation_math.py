"""Cross-entropy and logit distillation per pixel in Triton (docs/mathematics.md, section 7), right for any logit.

Blocks of classes: see pixel_math.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixel_math import (
    best_class,
    difference,
    exp_nonpositive,
    highest,
    is_class,
    numerators,
    others,
    pick,
    product,
    surprise,
    total,
)


@triton.jit
def cross_entropy_row(o, c, classes, label, class_weight, weight_sum, smoothing):
    """Cross-entropy of section 7 and the blocks of its gradient. ``class_weight``: blocks [classes, 1], 0 beyond K."""
    labelled = is_class(c, label)
    m = highest(o)
    student = ()
    for i in tl.static_range(len(o)):
        student = student + (exp_nonpositive(o[i] - m[None, :]),)
    at_label, rest = pick(student, labelled), others(student, labelled)
    o_label = pick(o, labelled)
    nll = surprise(at_label, rest, m - o_label)
    full_weight, smoothed = (), ()
    for i in tl.static_range(len(o)):
        full_weight = full_weight + (class_weight[i] + tl.zeros_like(o[i]),)
        smoothed = smoothed + (class_weight[i] * (o_label[None, :] - o[i]),)
    label_weight = pick(full_weight, labelled)
    share, inverse = smoothing / classes, 1.0 / (at_label + rest)
    hard = (1.0 - smoothing) * label_weight
    task = hard * nll + share * (weight_sum * nll + total(smoothed))
    error = -rest * inverse  # p_y - 1, without the cancellation
    factor = inverse * (share * weight_sum + hard)
    label_gradient = hard * error + share * (weight_sum * (1.0 + error) - label_weight)
    gradient = ()
    for i in tl.static_range(len(o)):
        g = student[i] * factor[None, :] - share * class_weight[i]
        gradient = gradient + (tl.where(labelled[i], label_gradient[None, :], g),)
    return task, gradient


@triton.jit
def distillation_row(o_s, o_t, c, temperature):
    """T^2 KL(softmax(o^t / T) || softmax(o^s / T)) of section 7 and the blocks of its gradient."""
    cold = 1.0 / temperature
    anchor = is_class(c, best_class(o_t, c))
    m_s, m_t = highest(o_s), highest(o_t)
    student, teacher = numerators(o_s, m_s, cold), numerators(o_t, m_t, cold)
    step = difference(o_t, o_s)
    s_anchor, s_others = pick(student, anchor), others(student, anchor)
    t_anchor, t_others = pick(teacher, anchor), others(teacher, anchor)
    log_ratio = surprise(s_anchor, s_others, (m_s - pick(o_s, anchor)) * cold)
    log_ratio -= surprise(t_anchor, t_others, (m_t - pick(o_t, anchor)) * cold)
    s_inverse, t_inverse = 1.0 / (s_anchor + s_others), 1.0 / (t_anchor + t_others)
    differences = others(product(teacher, step), anchor) - pick(step, anchor) * t_others
    kd = temperature * temperature * (differences * t_inverse * cold + log_ratio)
    anchored = t_others * t_inverse - s_others * s_inverse
    gradient = ()
    for i in tl.static_range(len(c)):
        g = student[i] * s_inverse[None, :] - teacher[i] * t_inverse[None, :]
        gradient = gradient + (tl.where(anchor[i], anchored[None, :], g) * temperature,)
    return kd, gradient
