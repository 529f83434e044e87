"""What the per-pixel mathematics of the losses is made of in Triton: exponentials, logarithms, sums over classes.

A row of pixels is a tuple of *blocks* [classes, pixels], because a block's length is a power of two and K rarely is:
K = 19 is 8, 8, 2 and 1. What has no classes is [pixels]. Classes beyond K have logit ``PADDING``, whose exponentials
are 0.
The losses themselves are in hakd_math.py and segmentation_math.py, as in csrc/pixel/.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIX_GUARD = tl.constexpr(1e-6)  # eps of section 3
PADDING = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's

# Exponentials and logarithms -----------------------------------------------------------------------------------


@triton.jit
def exp_nonpositive(x):
    """e^x for x <= 0, and 0 below -104: what has no mass must not count, however large what it is multiplied by."""
    x = tl.maximum(x, -110.0, propagate_nan=tl.PropagateNan.ALL)  # -inf - -inf would follow
    whole = x * 1.44269504
    rest = tl.fma(x, 1.92596299e-8, tl.fma(x, 1.44269504, -whole))  # of x log2(e), which is not a float
    e = tl.exp2(whole)
    return tl.fma(e, rest * 0.693147181, e)


@triton.jit
def log2_1p(e):
    """log2(1 + e) for 0 <= e < 1e37, to full relative precision: the hardware's logarithm is too coarse near 1.

    (1 + e) 2^-n - 1 is formed from e itself, so that nothing is lost in 1 + e; the polynomial is a minimax fit of
    log2(1 + f) on [0, 1] to a relative 3.0e-8.
    """
    exponent = (1.0 + e).to(tl.int32, bitcast=True) & 0x7F800000
    scale = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    # The exponent as a float by way of a mantissa: a conversion would take a slot of the special function unit.
    n = ((exponent >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0
    f = tl.fma(e, scale, scale - 1.0)
    p = tl.fma(f, 7.549182046e-3, -4.256706312e-2)
    p = tl.fma(p, f, 1.128561944e-1)
    p = tl.fma(p, f, -1.971189678e-1)
    p = tl.fma(p, f, 2.756414115e-1)
    p = tl.fma(p, f, -3.584084809e-1)
    p = tl.fma(p, f, 4.806929529e-1)
    p = tl.fma(p, f, -7.213401794e-1)
    p = tl.fma(p, f, 1.442695022)
    return tl.fma(p, f, n)


@triton.jit
def log1p(e):
    return LN2 * log2_1p(e)


@triton.jit
def softplus(a):
    """log(1 + e^a) for any a."""
    return tl.fma(log2_1p(exp_nonpositive(-tl.abs(a))), LN2, tl.maximum(a, 0.0))


@triton.jit
def sigmoid(a):
    """sigma(a) for any a."""
    e = exp_nonpositive(-tl.abs(a))
    return tl.where(a > 0, 1.0, e) / (1.0 + e)


# Blocks ---------------------------------------------------------------------------------------------------------


@triton.jit
def total(x):
    """Sum over classes."""
    s = tl.sum(x[0], 0)
    for i in tl.static_range(1, len(x)):
        s += tl.sum(x[i], 0)
    return s


@triton.jit
def highest(x):
    """Maximum over classes; a NaN may be passed over."""
    m = tl.max(x[0], 0)
    for i in tl.static_range(1, len(x)):
        m = tl.maximum(m, tl.max(x[i], 0))
    return m


@triton.jit
def product(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] * y[i],)
    return out


@triton.jit
def where_mass(mass, v):
    """``mass v``, and 0 where there is no mass: a class's distance may be infinite, or not a number (-inf - -inf)."""
    return mass * tl.where(mass == 0.0, 0.0, v)


@triton.jit
def add_scaled(x, y, factor):
    """x + factor y."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + factor * y[i],)
    return out


@triton.jit
def is_class(c, chosen):
    """Which class is a pixel's ``chosen`` one; ``c`` [classes, 1] are the blocks' class numbers."""
    out = ()
    for i in tl.static_range(len(c)):
        out = out + (c[i] == chosen[None, :],)
    return out


@triton.jit
def best_class(z, c):
    """Number of the first class with the highest logit; none for a NaN."""
    m = highest(z)
    best = tl.min(tl.where(z[0] == m[None, :], c[0], 1 << 30), 0)
    for i in tl.static_range(1, len(z)):
        best = tl.minimum(best, tl.min(tl.where(z[i] == m[None, :], c[i], 1 << 30), 0))
    return best


@triton.jit
def pick(x, mask):
    """The chosen class's value."""
    v = tl.sum(tl.where(mask[0], x[0], 0.0), 0)
    for i in tl.static_range(1, len(x)):
        v += tl.sum(tl.where(mask[i], x[i], 0.0), 0)
    return v


@triton.jit
def others(x, mask):
    """Sum over all classes but the chosen one.

    A network that is sure of a class has all but 1e-6 of its mass there, and its tiny loss and gradient are
    differences from it: they are formed from the others' part. For cross-entropy that class is the label, for a
    divergence the anchor, a network's best class.
    """
    v = tl.sum(tl.where(mask[0], 0.0, x[0]), 0)
    for i in tl.static_range(1, len(x)):
        v += tl.sum(tl.where(mask[i], 0.0, x[i]), 0)
    return v


@triton.jit
def numerators(z, m, cold):
    """e^{(z - m) / T}."""
    out = ()
    for i in tl.static_range(len(z)):
        out = out + (exp_nonpositive((z[i] - m[None, :]) * cold),)
    return out


@triton.jit
def value_of(z_s, m_s, z_h, m_h, CE: tl.constexpr):
    """v of csrc/pixel/hakd.h's guarded `finish`, of a block: (m^s - z^s) - (m^h - z^h), or m^s - z^s for "ce"."""
    v = z_s - m_s[None, :]  # as :func:`numerators` has it: there once
    if CE:
        v = -v
    else:
        v = (z_h - m_h[None, :]) - v
    return v


@triton.jit
def surprise(anchor, rest, distance):
    """-log of a class's probability; ``distance`` is (maximum - its logit) / T: at 0 its numerator is 1."""
    return distance + log1p(tl.where(distance == 0.0, rest, anchor + rest - 1.0))


@triton.jit
def log_total(anchor, rest):
    """log of a sum of numerators e^{(z - maximum) / T}, of which an anchor with the highest logit is 1."""
    return log1p(tl.where(anchor == 1.0, rest, anchor + rest - 1.0))
