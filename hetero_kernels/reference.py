"""HeteroAKD's mathematics in plain eager PyTorch: the definition that every backend is measured against.

Read it beside the specification: Huang et al., "Distilling Knowledge from Heterogeneous Architectures for
Semantic Segmentation", AAAI 2025 (arXiv 2504.07691); the section numbers below are those of docs/mathematics.md.
Any floating dtype (float64 computes in float64, everything else in float32), any device, ordinary autograd.
The public functions have the signatures of :mod:`hetero_kernels.functional`, whose docstrings describe the arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # section 3: symmetric guard of the mixing ratio


class HakdTerms(NamedTuple):
    """What :func:`hakd_loss` returns with ``return_terms=True``; only ``loss`` carries gradient."""

    loss: Tensor
    hakd: Tensor  # section 5, unweighted
    proj: Tensor  # section 6, unweighted


class SegmentationTerms(NamedTuple):
    """What :func:`segmentation_loss` returns with ``return_terms=True``; only ``loss`` carries gradient."""

    loss: Tensor
    task: Tensor  # cross-entropy, unweighted
    kd: Tensor  # logit distillation, unweighted


_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)
Normalizer = Tensor | Mapping[str, Tensor] | None


# Section 1: grids, labels ------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, h w]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h * w)


def _product(weight: Tensor, features: Tensor) -> Tensor:
    """[K, C] by [B, C, h, w] -> [B, K, h, w] in the features' memory format. A matrix product, which torch keeps in
    full float32 by default: cuDNN's convolutions round its factors to TF32."""
    if features.stride(1) == 1:
        return torch.matmul(features.permute(0, 2, 3, 1), weight.T).permute(0, 3, 1, 2)
    b, _, h, w = features.shape
    return torch.bmm(weight.expand(b, *weight.shape), _rows(features)).reshape(b, weight.shape[0], h, w)


class _Convolution(torch.autograd.Function):
    """1x1 convolution of features [B, C, h, w] by weight [K, C] and bias [K], all of one dtype, in whose weight
    gradient a pixel without a gradient counts exactly 0, whatever its features: 0 * NaN would be NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = _product(weight, features)
        return logits if bias is None else logits + bias[:, None, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors

        def by_weight(features: Tensor) -> Tensor:
            return torch.bmm(_rows(gradient), _rows(features).mT).sum(0)

        def reached() -> Tensor:
            return torch.where((gradient != 0).any(1, keepdim=True), features, 0.0)

        wanted = ctx.needs_input_grad
        of_weight = None
        with without_autocast(gradient.device.type):
            if wanted[1] and gradient.device.type == "cpu" and not torch.compiler.is_compiling():
                of_weight = by_weight(features)
                if _any(~of_weight.isfinite()):
                    of_weight = by_weight(reached())
            elif wanted[1]:  # looking at values would wait for them
                of_weight = by_weight(reached())
            of_features = _product(weight.T, gradient) if wanted[0] else None
        return of_features, of_weight, gradient.sum((0, 2, 3)) if wanted[2] else None


class _EagerConvolution(_Convolution):
    """With forward-mode derivatives, which torch.compile refuses to see defined."""

    @staticmethod
    def jvp(ctx: Any, features: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        primal_features, primal_weight = ctx.saved_tensors
        tangents = [] if features is None else [_product(primal_weight, features)]
        if weight is not None:
            tangents.append(_product(weight, primal_features))
        if bias is not None:
            tangents.append(bias[:, None, None])
        return sum(tangents[1:], tangents[0])


def _any(x: Tensor) -> bool:
    """Whether any element of a tensor on the CPU is true; also where that cannot be told."""
    try:
        return bool(x.any())
    except RuntimeError:  # a tensor without values: under vmap or a tracer
        return True


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """1x1 convolution in ``dtype``: features [B, C, h, w], weight [K, C], bias [K] -> [B, K, h, w]. Gradients
    come back in the inputs' dtypes; pixels whose logits get none contribute exactly 0, NaN and inf included."""
    convolution = _Convolution if torch.compiler.is_compiling() else _EagerConvolution
    bias = None if bias is None else bias.to(dtype)
    with without_autocast(features.device.type):
        return convolution.apply(savable(features).to(dtype), savable(weight).to(dtype), bias)


def project(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`convolve` in float32 or, if any argument has it, float64."""
    return convolve(features, weight, bias, _precision(features, weight, *(() if bias is None else (bias,))))


def without_autocast(device_type: str) -> torch.autocast | contextlib.nullcontext[None]:
    """A region in which autocast changes nothing; tensors without values know none."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What the region that this is called in casts to, if it casts."""
    casts = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if casts else None


def savable(x: _Tensor) -> _Tensor:
    """``x``, or its copy if it was made under ``torch.inference_mode``: autograd refuses to save such tensors.

    Not while compiling, where it cannot be told.
    """
    if x is None or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _same_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _precision(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def to_grid(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Logits [B, K, h, w] interpolated bilinearly to [B, K, *size], as ``F.interpolate`` does but for -inf, a class
    without mass: it reaches the pixels in whose interpolation it has a weight, and no others."""
    if tuple(logits.shape[-2:]) == size:
        return logits
    if logits.shape[0] == 0:  # F.interpolate refuses an empty batch
        return logits.new_zeros(*logits.shape[:2], *size) + logits.sum()

    def interpolate(x: Tensor) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)

    masked = logits == float("-inf")
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not _any(masked):
        return interpolate(logits)
    reached = interpolate(masked.to(logits.dtype)) > 0  # 0 * -inf would be NaN
    return interpolate(logits.masked_fill(masked, 0.0)).masked_fill(reached, float("-inf"))


def sample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] sampled as ``F.interpolate(mode="nearest")`` does, for any integer dtype."""
    if tuple(labels.shape[-2:]) == size:
        return labels

    def index(n_in: int, n_out: int) -> Tensor:
        scale = torch.tensor(n_in, dtype=torch.float32, device="cpu") / n_out  # a quotient of float32, too
        positions = torch.arange(n_out, dtype=torch.float32, device="cpu") * scale
        return positions.floor().long().clamp(max=n_in - 1).to(labels.device)

    rows, columns = index(labels.shape[-2], size[0]), index(labels.shape[-1], size[1])
    return labels[:, rows[:, None], columns]


class _Target(NamedTuple):
    """Labels of the loss grid, ready for the terms below."""

    classes: Tensor  # int64 [B, H, W], 0 where ignored
    valid: Tensor  # bool [B, H, W]
    poison: Tensor | None  # 0-dim: NaN where a label is out of range (devices that must not synchronise), else 0


def _target(labels: Tensor, num_classes: int, ignore_index: int) -> _Target:
    labels = labels.long()
    valid = labels != ignore_index
    wrong = valid & ((labels < 0) | (labels >= num_classes))
    poison = None
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if wrong.any():
            b, y, x = wrong.nonzero()[0].tolist()
            raise RuntimeError(
                f"labels[{b}, {y}, {x}] is {int(labels[b, y, x])}, expected a class in [0, {num_classes}) "
                f"or ignore_index={ignore_index}"
            )
    else:
        poison = torch.where(wrong.any(), float("nan"), 0.0)
    return _Target(labels.masked_fill(~valid | wrong, 0), valid, poison)


def _masked(logits: Tensor, target: _Target) -> Tensor:
    # Before anything else, so that neither values nor gradients of ignored pixels can carry NaN.
    return logits.masked_fill(~target.valid[:, None], 0.0)


# Section 2: reliability --------------------------------------------------------------------------------------


def binary_cross_entropy(z: Tensor, labelled: Tensor) -> Tensor:
    """H(z)_c = softplus(z_c) - y_c z_c, one-vs-rest, to full relative precision; ``labelled`` is bool like z."""
    return F.softplus(torch.where(labelled, -z, z), threshold=40.0)  # exact in float64 from 40 on


def _one_hot(target: _Target, num_classes: int) -> Tensor:
    classes = torch.arange(num_classes, device=target.classes.device)
    return target.classes[:, None] == classes[:, None, None]


# Sections 3 and 4: mixing, evaluation --------------------------------------------------------------------------


def mix(z_s: Tensor, z_t: Tensor, h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """KMM: reliability S and hybrid logits z^h; of a class that either network has at -inf, -inf."""
    reliability = (h_s + EPS) / (h_s + h_t + 2 * EPS)
    step = torch.where(z_s == float("-inf"), z_s, z_t - z_s)
    return reliability, z_s + reliability * step


def evaluation_weight(h_s: Tensor, h_h: Tensor, valid: Tensor, kem: str) -> Tensor:
    """KEM: the weight W [B, K, H, W]."""
    score = h_s + (h_s - h_h).clamp(min=0)
    if kem == "class":
        return score.softmax(1)
    ignored = ~valid[:, None]
    weight = score.masked_fill(ignored, float("-inf")).flatten(2).softmax(2).view_as(score)
    return weight.masked_fill(ignored, 0.0)


def weighted_by(mass: Tensor, x: Tensor) -> Tensor:
    """``mass * x``, and 0 where there is no mass: a class's logarithm is then -inf, or may overflow to it."""
    return torch.where(mass == 0, 0.0, mass * x)


# Sections 5 and 6: per-pixel terms -----------------------------------------------------------------------------


def _hakd_per_pixel(
    z_s: Tensor, z_t: Tensor, target: _Target, temperature: float, kmm: bool, kem: str, divergence: str
) -> tuple[Tensor, Tensor]:
    labelled = _one_hot(target, z_s.shape[1])
    h_s, h_t = binary_cross_entropy(z_s, labelled), binary_cross_entropy(z_t, labelled)
    proj = (h_s + h_t).sum(1) / z_s.shape[1]

    with torch.no_grad():
        z_h = mix(z_s, z_t, h_s, h_t)[1] if kmm else z_t
        log_p_h = (z_h / temperature).log_softmax(1)
        weighted = log_p_h.exp()
        if kem != "none":
            weighted *= evaluation_weight(h_s, binary_cross_entropy(z_h, labelled), target.valid, kem)
    log_p_s = (z_s / temperature).log_softmax(1)
    log_ratio = log_p_h - log_p_s if divergence == "kl" else -log_p_s
    hakd = temperature**2 * weighted_by(weighted, log_ratio).sum(1)
    return hakd, proj


# Section 7: cross-entropy --------------------------------------------------------------------------------------


def _cross_entropy(o: Tensor, classes: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """As ``F.cross_entropy(reduction="none")`` with all labels valid, but that a class of weight 0 contributes 0."""
    task = F.cross_entropy(o, classes, reduction="none", ignore_index=-100)
    if weight is not None:
        task = weighted_by(weight[classes], task)
    if label_smoothing:
        surprise = -o.log_softmax(1)
        smoothed = (surprise if weight is None else weighted_by(weight[:, None, None], surprise)).mean(1)
        task = (1 - label_smoothing) * task + label_smoothing * smoothed
    return task


# Section 8: reductions -----------------------------------------------------------------------------------------


def _divide(total: Tensor, divisor: Tensor) -> Tensor:
    divisor = divisor.to(total.dtype)
    return torch.where(divisor == 0, 0.0, total / torch.where(divisor == 0, 1.0, divisor))


def _normalizer(normalizer: Normalizer, term: str, own: Tensor) -> Tensor:
    if normalizer is None:
        return own
    chosen = normalizer.get(term) if isinstance(normalizer, Mapping) else normalizer
    return own if chosen is None else chosen.detach().to(own.device)


def _reduce(per_pixel: Tensor, target: _Target, reduction: str, divisor: Tensor) -> Tensor:
    per_pixel = torch.where(target.valid, per_pixel, 0.0)
    if target.poison is not None:
        per_pixel = per_pixel + target.poison.to(per_pixel.dtype)
    if reduction == "none":
        return per_pixel
    total = per_pixel.sum()
    return _divide(total, divisor) if reduction == "mean" else total


# The public functions ------------------------------------------------------------------------------------------


def _loss_grid(
    z_s: Tensor, z_t: Tensor, labels: Tensor, resolution: str, align_corners: bool, ignore_index: int
) -> tuple[Tensor, Tensor, _Target]:
    size = (labels.shape[1], labels.shape[2]) if resolution == "label" else (z_s.shape[2], z_s.shape[3])
    target = _target(sample_labels(labels, size), z_s.shape[1], ignore_index)
    z_s, z_t = _same_precision(z_s, z_t)
    grids = (to_grid(z, size, align_corners) for z in (z_s, z_t))
    z_s, z_t = (_masked(z, target) for z in grids)
    return z_s, z_t, target


def hakd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kmm: bool = True,
    kem: str = "class",
    divergence: str = "kl",
    hakd_weight: float = 1.0,
    proj_weight: float = 0.0,
    resolution: str = "label",
    align_corners: bool = False,
    ignore_index: int = 255,
    reduction: str = "mean",
    normalizer: Normalizer = None,
    return_terms: bool = False,
) -> Tensor | HakdTerms:
    """Sections 1 to 6 and 8; see :func:`hetero_kernels.functional.hakd_loss`."""
    with without_autocast(student_logits.device.type):
        z_s, z_t, target = _loss_grid(student_logits, teacher_logits, labels, resolution, align_corners, ignore_index)
        hakd, proj = _hakd_per_pixel(z_s, z_t, target, temperature, kmm, kem, divergence)
        count = target.valid.sum()
        images = torch.full_like(count, max(z_s.shape[0], 1) * z_s.shape[1]) if kem == "spatial" else count
        hakd = _reduce(hakd, target, reduction, _normalizer(normalizer, "hakd", images))
        proj = _reduce(proj, target, reduction, _normalizer(normalizer, "proj", count))
        loss = hakd_weight * hakd + proj_weight * proj
    return HakdTerms(loss, hakd.detach(), proj.detach()) if return_terms else loss


def projected_hakd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    kmm: bool = True,
    kem: str = "class",
    divergence: str = "kl",
    hakd_weight: float = 1.0,
    proj_weight: float = 0.0,
    resolution: str = "label",
    align_corners: bool = False,
    ignore_index: int = 255,
    reduction: str = "mean",
    normalizer: Normalizer = None,
    return_terms: bool = False,
) -> Tensor | HakdTerms:
    """Section 1's projection, then :func:`hakd_loss`."""
    student_logits = project(student_features, student_weight, student_bias)
    teacher_logits = project(teacher_features, teacher_weight, teacher_bias)
    return hakd_loss(
        student_logits, teacher_logits, labels, temperature=temperature, kmm=kmm, kem=kem, divergence=divergence,
        hakd_weight=hakd_weight, proj_weight=proj_weight, resolution=resolution, align_corners=align_corners,
        ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, return_terms=return_terms,
    )  # fmt: skip


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    task_weight: float = 1.0,
    kd_weight: float = 0.1,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    ignore_index: int = 255,
    reduction: str = "mean",
    normalizer: Normalizer = None,
    return_terms: bool = False,
) -> Tensor | SegmentationTerms:
    """Sections 7 and 8; see :func:`hetero_kernels.functional.segmentation_loss`."""
    size = (labels.shape[1], labels.shape[2])
    with without_autocast(logits.device.type):
        target = _target(labels, logits.shape[1], ignore_index)
        if teacher_logits is None:
            (o_s,), o_t = _same_precision(logits), None
        else:
            o_s, o_t = _same_precision(logits, teacher_logits.detach())
            o_t = _masked(to_grid(o_t, size, align_corners), target)
        o_s = _masked(to_grid(o_s, size, align_corners), target)

        weight = None if class_weight is None else class_weight.to(o_s.dtype)
        task = _cross_entropy(o_s, target.classes, weight, label_smoothing)
        count = target.valid.sum()
        weights = count if weight is None else (weight[target.classes] * target.valid).sum()
        task = _reduce(task, target, reduction, _normalizer(normalizer, "task", weights))

        if o_t is None:
            kd = torch.zeros_like(task)
        else:
            log_p_t, log_p_s = (o_t / temperature).log_softmax(1), (o_s / temperature).log_softmax(1)
            kd = temperature**2 * weighted_by(log_p_t.exp(), log_p_t - log_p_s).sum(1)
            kd = _reduce(kd, target, reduction, _normalizer(normalizer, "kd", count))
        loss = task_weight * task + kd_weight * kd
    return SegmentationTerms(loss, task.detach(), kd.detach()) if return_terms else loss


@torch.no_grad()
def hakd_maps(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    kmm: bool = True,
    kem: str = "class",
    resolution: str = "label",
    align_corners: bool = False,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sections 1 to 4 as pictures; see :func:`hetero_kernels.functional.hakd_maps`."""
    with without_autocast(student_logits.device.type):
        z_s, z_t, target = _loss_grid(student_logits, teacher_logits, labels, resolution, align_corners, ignore_index)
        labelled = _one_hot(target, z_s.shape[1])
        h_s, h_t = binary_cross_entropy(z_s, labelled), binary_cross_entropy(z_t, labelled)
        reliability, hybrid = mix(z_s, z_t, h_s, h_t) if kmm else (torch.ones_like(z_s), z_t)
        if kem == "none":
            weight = torch.ones_like(z_s)
        else:
            weight = evaluation_weight(h_s, binary_cross_entropy(hybrid, labelled), target.valid, kem)
        ignored = ~target.valid[:, None]
        if target.poison is not None:
            reliability, hybrid, weight = (m + target.poison.to(m.dtype) for m in (reliability, hybrid, weight))
        return reliability.masked_fill(ignored, 0), hybrid.masked_fill(ignored, 0), weight.masked_fill(ignored, 0)
