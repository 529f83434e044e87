"""HeteroAKD per pixel in Triton (docs/mathematics.md, sections 2 to 6): values and closed-form gradients, twice.

The bounded form works on the numbers e^z themselves, the guarded one with maxima and logarithms. Blocks of classes: see
pixel_math.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixel_math import (
    LN2,
    LOG2E,
    MIX_GUARD,
    best_class,
    exp_nonpositive,
    highest,
    is_class,
    log1p,
    log2_1p,
    log_total,
    numerators,
    others,
    pick,
    product,
    sigmoid,
    softplus,
    total,
    value_of,
    where_mass,
)

# Bounded -------------------------------------------------------------------------------------------------------
# Works on the numbers e^z themselves: 3 exponentials, 2 logarithms and 2 reciprocals a class, right for |z| up to
# ``bounded_limit`` of launch.py. Logits come in units of T ln 2 (w = z / (T ln 2), so that e^{z / T} = 2^w);
# reliabilities are counted in units of ln 2. A pixel's label and anchor are taken out of the blocks (their logit
# becomes ``OFF``) and evaluated on their own: no class in a block is labelled, and sums over blocks are sums over the
# others.

OFF = tl.constexpr(-1024.0)


@triton.jit
def reciprocal(x):
    """1 / x for 1e-30 < x < 1e30: one special function and a Newton step, where a division takes eight instructions."""
    root = tl.rsqrt(x)
    r = root * root
    return tl.fma(r, tl.fma(-x, r, 1.0), r)


@triton.jit
def untempered(tempered, w, temperature, POWER: tl.constexpr):
    """e^z from e^{z / T}; POWER is T where that is 1, 2 or 4, else 0."""
    if POWER == 1:
        e = tempered
    elif POWER == 2:
        e = tempered * tempered
    elif POWER == 4:
        e = tempered * tempered * (tempered * tempered)
    else:
        e = tl.exp2(w * temperature)
    return e


@triton.jit
def visit(w_s, w_t, sign, temperature, POWER: tl.constexpr, KMM: tl.constexpr, KEM: tl.constexpr, PROJ: tl.constexpr):
    """Sections 2 to 4 of classes of one kind: ``sign`` is None where no class is labelled, else -1 or 1 for each pixel.

    Returns e^{z^s / T}, W e^{z^h / T}, e^{z^h / T}, z^h - z^s, W, H(z^s) + H(z^t), and the derivatives of both H.
    """
    student = tl.exp2(w_s)
    if sign is None:
        a_s, a_t = untempered(student, w_s, temperature, POWER), tl.exp2(w_t * temperature)
    else:
        a_s, a_t = tl.exp2(sign * temperature * w_s), tl.exp2(sign * temperature * w_t)
    h_s = log2_1p(a_s)
    reliabilities = h_s + log2_1p(a_t)
    step = w_t - w_s
    w_h = w_t
    if KMM:
        guard = MIX_GUARD * LOG2E
        step *= (h_s + guard) * reciprocal(reliabilities + 2.0 * guard)
        w_h = w_s + step
    hybrid = tl.exp2(w_h)
    weight = tl.full(hybrid.shape, 1.0, tl.float32)
    u_s = 1.0 + a_s
    if KEM != "none":
        if sign is None:
            a_h = untempered(hybrid, w_h, temperature, POWER)
        else:
            a_h = tl.exp2(sign * temperature * w_h)
        ratio = u_s * tl.rsqrt(1.0 + a_h)
        weight = tl.maximum(u_s, ratio * ratio)  # e^q = u_s max(1, u_s / u_h)
    error_s, error_t = student, student
    if PROJ:
        r_s, r_t = tl.rsqrt(u_s), tl.rsqrt(1.0 + a_t)
        error_s, error_t = a_s * r_s * r_s, a_t * r_t * r_t
        if sign is not None:
            error_s, error_t = sign * error_s, sign * error_t
    return student, hybrid * weight, hybrid, step, weight, reliabilities, error_s, error_t


@triton.jit
def visit_blocks(w_s, w_t, temperature, POWER: tl.constexpr, KMM: tl.constexpr, KEM: tl.constexpr, PROJ: tl.constexpr):
    """:func:`visit` of blocks without labels: blocks to keep (e^{z^s / T}, W e^{z^h / T}, both errors), and sums over
    classes (of the kept two, e^{z^h / T}, W e^{z^h / T} (z^h - z^s), the same times -z^s, W and the reliabilities)."""
    student, weighted, error_s, error_t = (), (), (), ()
    s_sum = tl.zeros([w_s[0].shape[1]], tl.float32)
    w_sum, h_sum, step_sum, ce_sum, weight_sum, r_sum = s_sum, s_sum, s_sum, s_sum, s_sum, s_sum
    for i in tl.static_range(len(w_s)):
        s, w, h, step, weight, r, e_s, e_t = visit(w_s[i], w_t[i], None, temperature, POWER, KMM, KEM, PROJ)
        student = student + (s,)
        weighted = weighted + (w,)
        error_s = error_s + (e_s,)
        error_t = error_t + (e_t,)
        s_sum += tl.sum(s, 0)
        w_sum += tl.sum(w, 0)
        h_sum += tl.sum(h, 0)
        step_sum += tl.sum(w * step, 0)
        ce_sum -= tl.sum(w * w_s[i], 0)
        weight_sum += tl.sum(weight, 0)
        r_sum += tl.sum(r, 0)
    return (student, weighted, error_s, error_t), (s_sum, w_sum, h_sum, step_sum, ce_sum, weight_sum, r_sum)


@triton.jit
def surprise_ratio(others_a, anchor_a, others_b, anchor_b):
    """log(1 + a) - log(1 + b), as one logarithm: the two may be large and close."""
    a, b = others_a / anchor_a, others_b / anchor_b
    log = log1p(tl.abs(a - b) / (1.0 + tl.minimum(a, b)))
    return tl.where(a > b, log, -log)


@triton.jit
def best_class_tagged(w, c):
    """A class within 0.01 % of the best: its number takes the place of the logit's last bits, so that one maximum finds
    both. For up to 1024 classes."""
    best = tl.max((w[0].to(tl.int32, bitcast=True) & ~1023 | c[0]).to(tl.float32, bitcast=True), 0)
    for i in tl.static_range(1, len(w)):
        tagged = (w[i].to(tl.int32, bitcast=True) & ~1023 | c[i]).to(tl.float32, bitcast=True)
        best = tl.maximum(best, tl.max(tagged, 0))
    return best.to(tl.int32, bitcast=True) & 1023


@triton.jit
def hakd_row_bounded(
    w_s, w_t, c, classes, label, temperature, hakd_factor, proj_factor, POWER: tl.constexpr, KMM: tl.constexpr,
    KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """:func:`hakd_row` for bounded logits. Returns l_n, r_n and the blocks of both networks' gradients: of
    ``hakd_factor`` l_n + ``proj_factor`` r_n. Not for kem="spatial", whose normalisers are sums of rounded scores:
    weights of unrounded ones would not add up to 1."""
    if KMM:
        anchor = best_class_tagged(w_s, c)
    else:
        anchor = best_class_tagged(w_t, c)
    is_label, is_anchor = is_class(c, label), is_class(c, anchor)
    rest_s, rest_t = (), ()
    length: tl.constexpr = 0
    for i in tl.static_range(len(c)):
        special = is_label[i] | is_anchor[i]
        rest_s = rest_s + (tl.where(special, OFF, w_s[i]),)
        rest_t = rest_t + (tl.where(special, OFF, w_t[i]),)
        length = length + c[i].shape[0]
    kept, sums = visit_blocks(rest_s, rest_t, temperature, POWER, KMM, KEM, PROJ)
    student, weighted, error_s, error_t = kept
    s_others, w_others, h_others, step_others, ce_others, weight_sum, reliabilities = sums

    # The label, where it is not the anchor; and the anchor.
    same = label == anchor
    ls, lt = pick(w_s, is_label), pick(w_t, is_label)
    l_s, l_w, l_h, l_step, l_weight, l_r, l_es, l_et = visit(ls, lt, -1.0, temperature, 0, KMM, KEM, PROJ)
    ws, wt = pick(w_s, is_anchor), pick(w_t, is_anchor)
    sign = tl.where(same, -1.0, 1.0)
    a_s, a_w, a_h, a_step, a_weight, a_r, a_es, a_et = visit(ws, wt, sign, temperature, 0, KMM, KEM, PROJ)
    s_others += tl.where(same, 0.0, l_s)
    w_others += tl.where(same, 0.0, l_w)
    h_others += tl.where(same, 0.0, l_h)
    step_others += tl.where(same, 0.0, l_w * l_step)
    ce_others -= tl.where(same, 0.0, l_w * ls)
    # A class that is off weighs 1.
    weight_sum += a_weight - (length - classes + 1) + tl.where(same, 0.0, l_weight - 1.0)
    reliabilities += a_r + tl.where(same, 0.0, l_r)

    unit = temperature * LN2
    if CE:
        log_ratio = log1p(s_others / a_s)
        differences = (ce_others + ws * w_others) * unit
    else:
        log_ratio = surprise_ratio(s_others, a_s, h_others, a_h)
        differences = (step_others - a_step * w_others) * unit
    s_sum, h_sum, w_sum = a_s + s_others, a_h + h_others, a_w + w_others
    if KEM == "class":
        inverse = 1.0 / (h_sum * weight_sum)
    else:
        inverse = 1.0 / h_sum
    s_inverse = 1.0 / s_sum
    hakd = temperature * temperature * inverse * (w_sum * log_ratio + differences / temperature)
    hot = temperature * hakd_factor
    weighted_factor = hot * inverse
    student_factor = w_sum * inverse * s_inverse * hot
    anchored = hot * (a_s * s_inverse * (w_others * inverse) - a_w * inverse * (s_others * s_inverse))
    labelled = l_s * student_factor - l_w * weighted_factor
    if PROJ:
        anchored += proj_factor * a_es
        labelled += proj_factor * l_es
    g_s, g_t = (), ()
    for i in tl.static_range(len(c)):
        g = student[i] * student_factor[None, :] - weighted[i] * weighted_factor[None, :]
        if PROJ:
            g += error_s[i] * proj_factor[None, :]
            t = tl.where(is_label[i], l_et[None, :], error_t[i])
            g_t = g_t + (tl.where(is_anchor[i], a_et[None, :], t) * proj_factor[None, :],)
        g = tl.where(is_label[i], labelled[None, :], g)
        g_s = g_s + (tl.where(is_anchor[i], anchored[None, :], g),)
    return hakd, reliabilities * LN2 / classes, g_s, g_t


# Guarded: right for any logit ----------------------------------------------------------------------------------


@triton.jit
def reliability(z, labelled):
    """H(z), section 2."""
    return softplus(tl.where(labelled, -z, z))


@triton.jit
def mix(z_s, z_t, labelled, KMM: tl.constexpr):
    """Sections 2 to 4: the sum of H(z^s) + H(z^t), z^h and KEM's score q."""
    reliabilities = tl.zeros([z_s[0].shape[1]], tl.float32)
    hybrid, score = (), ()
    for i in tl.static_range(len(z_s)):
        h_s = reliability(z_s[i], labelled[i])
        both = h_s + reliability(z_t[i], labelled[i])
        z_h = z_t[i]  # itself without mixing: z^s + (z^t - z^s) would round away what a sure teacher says
        if KMM:
            step = tl.where(z_s[i] == float("-inf"), z_s[i], z_t[i] - z_s[i])  # of a masked class z^h is -inf, too
            z_h = z_s[i] + (h_s + MIX_GUARD) / (both + 2.0 * MIX_GUARD) * step
        reliabilities += tl.sum(both, 0)
        hybrid = hybrid + (z_h,)
        score = score + (h_s + tl.maximum(h_s - reliability(z_h, labelled[i]), 0.0),)
    return reliabilities, hybrid, score


@triton.jit
def evaluate(score, m, c, classes, spatial, KEM: tl.constexpr):
    """W of section 4, up to a factor of the pixel; 0 beyond K. ``m``: no score is above.

    ``spatial`` are, for kem="spatial", blocks [classes, 1] of an image's highest score m and of 1 / sum_n e^{q - m}.
    """
    out = ()
    for i in tl.static_range(len(score)):
        if KEM == "class":
            w = exp_nonpositive(score[i] - m[None, :])
        elif KEM == "spatial":
            w = exp_nonpositive(score[i] - spatial[0][i]) * spatial[1][i]
        else:
            w = tl.zeros_like(score[i]) + 1.0
        out = out + (tl.where(c[i] < classes, w, 0.0),)
    return out


@triton.jit
def hakd_row(
    z_s, z_t, c, classes, label, spatial, temperature, hakd_factor, proj_factor,
    KMM: tl.constexpr, KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr,
):  # fmt: skip
    """l_n of section 5, r_n of section 6, and the blocks of both networks' gradients: of ``hakd_factor`` l_n +
    ``proj_factor`` r_n, those of z^t only with PROJ."""
    cold = 1.0 / temperature
    labelled = is_class(c, label)
    reliabilities, z_h, score = mix(z_s, z_t, labelled, KMM)
    weight = evaluate(score, highest(score), c, classes, spatial, KEM)  # beyond K scores are 0, and none is below
    weight_sum = total(weight)
    if KMM:
        anchor = is_class(c, best_class(z_s, c))
    else:
        anchor = is_class(c, best_class(z_t, c))
    m_s, m_h = highest(z_s), highest(z_h)
    student = numerators(z_s, m_s, cold)
    hybrid = numerators(z_h, m_h, cold)
    weighted = product(hybrid, weight)

    s_sums = (pick(student, anchor), others(student, anchor))
    h_sums = (pick(hybrid, anchor), others(hybrid, anchor))
    w_sums = (pick(weighted, anchor), others(weighted, anchor))
    value = tl.zeros_like(m_s)
    for i in tl.static_range(len(c)):
        value += tl.sum(where_mass(weighted[i], value_of(z_s[i], m_s, z_h[i], m_h, CE)), 0)
    hakd, factors = finish(s_sums, h_sums, w_sums, value, weight_sum, temperature, hakd_factor, KEM, CE)
    g_s, g_t = (), ()
    for i in tl.static_range(len(c)):
        g, t = gradient_block(
            student[i], weighted[i], z_s[i], z_t[i], anchor[i], labelled[i], factors, proj_factor, PROJ
        )
        g_s = g_s + (g,)
        if PROJ:
            g_t = g_t + (t,)
    return hakd, reliabilities / classes, g_s, g_t


@triton.jit
def finish(
    student, hybrid, weighted, value, weight_sum, temperature, hakd_factor, KEM: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """l_n and the factors of its gradient, from sums over classes.

    Pairs, the anchor's part and the others': of e^{(z^s - m) / T}, e^{(z^h - m) / T} and W e^{(z^h - m) / T}. Over all
    classes: of W e^{(z^h - m) / T} v, see :func:`value_of`, and of W.
    """
    cold = 1.0 / temperature
    # log p^h_c - log p^s_c = log_ratio + v_c / T.
    log_ratio = log_total(student[0], student[1])
    if not CE:
        log_ratio -= log_total(hybrid[0], hybrid[1])
    s_sum, h_sum, w_sum = student[0] + student[1], hybrid[0] + hybrid[1], weighted[0] + weighted[1]
    if KEM == "class":
        h_sum *= weight_sum
    inverse = 1.0 / h_sum
    student_factor = w_sum * inverse / s_sum
    anchored = student[0] / s_sum * (weighted[1] * inverse) - weighted[0] * inverse * (student[1] / s_sum)
    hakd = temperature * temperature * inverse * (w_sum * log_ratio + value * cold)
    hot = temperature * hakd_factor
    return hakd, (hot * student_factor, hot * inverse, hot * anchored)


@triton.jit
def gradient_block(student, weighted, z_s, z_t, anchor, labelled, factors, proj_factor, PROJ: tl.constexpr):
    """A block of both networks' gradients, of ``factors`` of :func:`finish`; the teacher's is there only with PROJ."""
    g = student * factors[0][None, :] - weighted * factors[1][None, :]
    g = tl.where(anchor, factors[2][None, :], g)
    t = g
    if PROJ:
        g += proj_gradient(z_s, labelled) * proj_factor[None, :]
        t = proj_gradient(z_t, labelled) * proj_factor[None, :]
    return g, t


@triton.jit
def proj_gradient(z, labelled):
    """dH(z) / dz = sigma(z) - y of section 6."""
    error = sigmoid(tl.where(labelled, -z, z))
    return tl.where(labelled, -error, error)
