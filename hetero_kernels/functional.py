"""The losses as functions: check the arguments, choose the backend, call the operator.

Values and gradients agree with :mod:`hetero_kernels.reference`, which has the same signatures. All functions take
float32, bfloat16, float16 or float64 tensors of any strides, compute in float32 (float64 if any input is float64)
and return gradients in the inputs' dtypes. ``torch.autocast`` changes nothing inside them. Tensors made under
``torch.inference_mode``, which autograd refuses to save, are copied (not while compiling); those of ``torch.no_grad``
need no copy. Section numbers are those of docs/mathematics.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import arguments as check
from . import reference
from .ops import backends, pixel_losses, projected_losses
from .ops import projection as projection_ops
from .ops.library import compute_dtype
from .options import HakdOptions, SegmentationOptions
from .reference import HakdTerms, Normalizer, SegmentationTerms, savable

__all__ = ["HakdTerms", "SegmentationTerms", "hakd_loss", "hakd_maps", "projected_hakd_loss", "segmentation_loss"]


Options = TypeVar("Options", HakdOptions, SegmentationOptions)


@functools.lru_cache(maxsize=64, typed=True)
def _checked(kind: Any, *choices: Any, **named: Any) -> Any:
    return kind(*choices, **named)


def _options(kind: type[Options], *choices: Any, **named: Any) -> Options:
    """Checked when they are first met: a step repeats those of the step before."""
    if torch.compiler.is_compiling():
        return kind(*choices, **named)
    try:
        return _checked(kind, *choices, **named)  # type: ignore[arg-type]
    except TypeError:  # of what has no hash, too, which is no option: below that is said
        pass
    return kind(*choices, **named)


def _check_hakd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, options: HakdOptions,
    temperature: float, hakd_weight: float, proj_weight: float,
) -> None:  # fmt: skip
    check.check_maps("student_logits", student_logits, "K")
    check.check_maps("teacher_logits", teacher_logits, "K")
    check.check_pair("student_logits", student_logits, "teacher_logits", teacher_logits, channels=True)
    _check_hakd_call(
        student_logits, student_logits.shape[1], labels, options, temperature, hakd_weight, proj_weight
    )  # fmt: skip


def _check_hakd_call(
    student: Tensor, num_classes: int, labels: Tensor, options: HakdOptions,
    temperature: float, hakd_weight: float, proj_weight: float,
) -> None:  # fmt: skip
    """What does not depend on whether ``student`` [B, ., hs, ws] holds logits or features."""
    check.check_labels(labels, student.shape[0], num_classes, student)
    if check.label_values_wanted():
        if options.resolution == "feature":
            labels = reference.sample_labels(labels, (student.shape[2], student.shape[3]))
        check.check_label_values(labels, num_classes, options.ignore_index)
    _say_that_a_class_is_ignored(num_classes, options.ignore_index)
    check.check_temperature("temperature", temperature)
    check.check_number("hakd_weight", hakd_weight)
    check.check_number("proj_weight", proj_weight)


def _say_that_a_class_is_ignored(num_classes: int, ignore_index: int) -> None:
    """Once, where 255 is a class and also, which is the default, the label of pixels that do not count."""
    if num_classes > 255 and ignore_index == 255 and not torch.compiler.is_compiling():
        backends.warn_once(
            "hetero_kernels ignores label 255, which is also a class where there are more than 255 of them. "
            "Pass another ignore_index, -100 for one, if class 255 is meant.",
            stacklevel=6,
        )


def _normalizers(normalizer: Normalizer, terms: tuple[str, ...], like: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(map(savable, check.split_normalizer(normalizer, terms, like)))


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
    backend: str | None = None,
) -> Tensor | HakdTerms:
    """HeteroAKD's distillation loss on projected logits (sections 1 to 6 and 8).

    ``hakd_weight * L_hakd + proj_weight * L_proj``: per pixel of the loss grid, student and teacher logits are mixed
    by reliability against the label (KMM), the classes weighted by what the student still has to learn (KEM), and the
    student is drawn to the mixture by a weighted KL term; ``L_proj`` supervises both projections by the labels.

    With ``kem="class"`` the weights of a pixel add up to 1, so the term is about 1/K of a plain KL and a weight of 1
    is weak. The weighted KL is commonly negative at first, and its minimiser is the normalised ``W p^h`` rather than
    ``p^h``.

    Args:
        student_logits: [B, K, hs, ws], K >= 1 (tested to 1000). B may be 0.
        teacher_logits: [B, K, ht, wt], grid and dtype may differ from the student's. Gradients reach it through
            ``proj_weight`` only; with 0 they are exact zeros.
        labels: int64, int32 or uint8 [B, H, W], classes in [0, K) or ``ignore_index``.
        temperature: T in [1e-6, 1e6] of the divergence (section 5).
        kmm, kem, divergence, resolution, align_corners, ignore_index, reduction: see
            :class:`hetero_kernels.options.HakdOptions`.
        hakd_weight, proj_weight: numbers >= 0; like ``temperature`` they may change at every call.
        normalizer: 0-dim tensor that replaces the divisors of ``reduction="mean"``, or a mapping with the keys
            "hakd" and "proj"; under DistributedDataParallel, which averages gradients, the global number of valid
            pixels divided by the number of processes (:func:`hetero_kernels.mean_over_processes`), in gradient
            accumulation the number of the whole step. Never synchronises.
        return_terms: return :class:`HakdTerms` with the unweighted, detached terms beside the loss.
        backend: None (automatic), "reference", "cpu", "cuda" or "triton".

    Returns:
        The loss, float32 (float64), 0-dim or [B, loss grid] with ``reduction="none"``. Without a valid pixel it is 0
        with zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
        RuntimeError: a label outside [0, K) that is not ``ignore_index`` (CPU tensors; on a GPU the loss becomes NaN
            unless ``HETERO_KERNELS_CHECK_LABELS=1`` asks for a synchronising check), a backend that is not available,
            or a second derivative of a fused backend.

    A class at -inf or the dtype's lowest value is one without mass: it contributes 0 wherever the target has none.
    Batches of gradients (``is_grads_batched=True``, ``torch.func.jacrev``) are supported; forward-mode derivatives
    (``torch.func.jvp``) exist for ``backend="reference"`` only, and raise NotImplementedError elsewhere.
    """
    options = _options(HakdOptions, kmm, kem, divergence, resolution, align_corners, ignore_index, reduction)
    _check_hakd(student_logits, teacher_logits, labels, options, temperature, hakd_weight, proj_weight)
    normalizers = _normalizers(normalizer, ("hakd", "proj"), student_logits)
    student_logits, teacher_logits, labels = map(savable, (student_logits, teacher_logits, labels))
    chosen = backends.select(backend, str(student_logits.device))
    check.check_compute_dtype(chosen, student_logits=student_logits, teacher_logits=teacher_logits)
    if chosen == "reference":
        return reference.hakd_loss(
            student_logits, teacher_logits, labels, temperature=temperature, kmm=kmm, kem=kem, divergence=divergence,
            hakd_weight=hakd_weight, proj_weight=proj_weight, resolution=resolution, align_corners=align_corners,
            ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, return_terms=return_terms,
        )  # fmt: skip
    terms = pixel_losses.hakd_loss(
        student_logits, teacher_logits, labels, options, temperature, hakd_weight, proj_weight, normalizers, chosen
    )
    return HakdTerms(*terms) if return_terms else terms[0]


Projection = Tensor | tuple[Tensor, Tensor, Tensor, bool]
"""A network's logits [B, K, h, w]; or raw ones, with a scale and a shift per class and whether ReLU follows."""


def hakd_loss_of_projections(
    student: Projection, teacher: Projection, labels: Tensor, *,
    temperature: float, hakd_weight: float, proj_weight: float, normalizer: Normalizer, return_terms: bool,
    backend: str | None, **choices: Any,
) -> Tensor | HakdTerms:  # fmt: skip
    """:func:`hakd_loss` of what projectors give: scale, shift and ReLU are applied where a raw logit is read.

    Raw logits are for backends that have the operators of ``ops.projection``. ``choices``: as
    :class:`hetero_kernels.options.HakdOptions`.
    """
    numbers = (temperature, hakd_weight, proj_weight)
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return hakd_loss(
            student, teacher, labels, temperature=temperature, hakd_weight=hakd_weight, proj_weight=proj_weight,
            normalizer=normalizer, return_terms=return_terms, backend=backend, **choices,
        )  # fmt: skip
    options = _options(HakdOptions, **choices)
    student, teacher = _with_scale(student), _with_scale(teacher)
    _check_hakd(student[0], teacher[0], labels, options, *numbers)
    normalizers = _normalizers(normalizer, ("hakd", "proj"), student[0])
    chosen = backends.select_among(projection_ops.able(), backend, str(student[0].device))
    check.check_compute_dtype(chosen, student_logits=student[0], teacher_logits=teacher[0])
    terms = pixel_losses.normalized_hakd_loss(student, teacher, savable(labels), options, *numbers, normalizers, chosen)
    return HakdTerms(*terms) if return_terms else terms[0]


def _with_scale(network: Projection) -> tuple[Tensor, Tensor, Tensor, bool]:
    if not isinstance(network, Tensor):
        return network
    one = network.new_ones(network.shape[1], dtype=compute_dtype(network))
    return savable(network), one, torch.zeros_like(one), False


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
    backend: str | None = None,
) -> Tensor | HakdTerms:
    """:func:`hakd_loss` of two networks' features, the 1x1 projections included (section 1).

    Where both networks share a grid and ``resolution="feature"`` (and ``kem`` is not "spatial", whose weights need all
    of an image's logits first), one pass over the features computes loss and gradients and no logits of the batch are
    kept but their gradient (backends "cpu" and, up to 192 classes, "cuda" and "triton"; the latter reads the features
    again for the weights' gradients, and so does "cuda" beyond 32 classes or 768 channels). Elsewhere the projections
    run on their own, by kernels too (with the backend "reference" as torch's matrix products in float32), and
    :func:`hakd_loss` does the rest. The results agree to rounding, and features that only ignored pixels reach
    contribute exactly 0, NaN and inf included.

    Args:
        student_features: [B, Cs, hs, ws].
        teacher_features: [B, Ct, ht, wt].
        student_weight, teacher_weight: [K, Cs] and [K, Ct].
        student_bias, teacher_bias: [K] or None.
        labels and the options: as :func:`hakd_loss`.

    Returns, raises: as :func:`hakd_loss`.
    """
    check.check_maps("student_features", student_features, "Cs")
    check.check_maps("teacher_features", teacher_features, "Ct")
    check.check_pair("student_features", student_features, "teacher_features", teacher_features, channels=False)
    check.check_projection("student", student_weight, student_bias, student_features, None)
    check.check_projection("teacher", teacher_weight, teacher_bias, teacher_features, student_weight.shape[0])
    able = projected_losses.able(student_weight.shape[0])
    chosen = backends.select_among(able, backend, str(student_features.device))
    check.check_compute_dtype(
        chosen, student_features=student_features, teacher_features=teacher_features, student_weight=student_weight,
        teacher_weight=teacher_weight, student_bias=student_bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    one_pass = (
        resolution == "feature"
        and student_features.shape[2:] == teacher_features.shape[2:]
        and kem != "spatial"
        and chosen in able
    )
    if not one_pass:
        chosen = backends.select_among(projection_ops.able(), backend, str(student_features.device))
        project: Callable[..., Projection] = reference.project
        if chosen in projection_ops.able():
            project = functools.partial(_project, backend=chosen)
        return hakd_loss_of_projections(
            project(student_features, student_weight, student_bias),
            project(teacher_features, teacher_weight, teacher_bias),
            labels, temperature=temperature, kmm=kmm, kem=kem, divergence=divergence,
            hakd_weight=hakd_weight, proj_weight=proj_weight, resolution=resolution, align_corners=align_corners,
            ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, return_terms=return_terms,
            backend=backend,
        )  # fmt: skip
    options = _options(HakdOptions, kmm, kem, divergence, resolution, align_corners, ignore_index, reduction)
    classes = student_weight.shape[0]
    _check_hakd_call(student_features, classes, labels, options, temperature, hakd_weight, proj_weight)
    terms = projected_losses.projected_hakd_loss(
        savable(student_features), savable(teacher_features), savable(student_weight), savable(teacher_weight),
        savable(student_bias), savable(teacher_bias), savable(labels), options, temperature, hakd_weight, proj_weight,
        _normalizers(normalizer, ("hakd", "proj"), student_features), chosen,
    )  # fmt: skip
    return HakdTerms(*terms) if return_terms else terms[0]


def _project(features: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Projection:
    """As :func:`reference.project`, by the kernels."""
    dtype = compute_dtype(features, weight, bias)
    logits, _, _ = projection_ops.project(
        savable(features), savable(weight.to(dtype) if dtype == torch.float64 else weight), False, "none", backend
    )
    logits, scale, shift, relu = _with_scale(logits)
    return logits, scale, shift if bias is None else savable(bias).to(dtype), relu


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
    backend: str | None = None,
) -> Tensor | SegmentationTerms:
    """Cross-entropy and logit distillation on a network's own output logits (sections 7 and 8).

    ``task_weight * CE + kd_weight * T^2 KL(teacher || student)`` of the logits interpolated to the labels, without
    writing the interpolated logits down.

    Args:
        logits: [B, K, h, w] at the network's own stride.
        labels: int64, int32 or uint8 [B, H, W], classes in [0, K) or ``ignore_index``.
        teacher_logits: [B, K, ht, wt] or None (then the distillation term is 0); a constant, gets no gradient.
        task_weight, kd_weight: numbers >= 0 that may change at every call.
        temperature: T in [1e-6, 1e6] of the distillation term.
        class_weight: floating [K] or None; ``label_smoothing``: number in [0, 1): as ``F.cross_entropy``.
        align_corners, ignore_index, reduction: see :class:`hetero_kernels.options.SegmentationOptions`.
        normalizer: as :func:`hakd_loss`, keys "task" and "kd".
        return_terms: return :class:`SegmentationTerms`.
        backend: as :func:`hakd_loss`.

    Returns, raises: as :func:`hakd_loss`; the mean of the cross-entropy divides by the sum of the valid pixels' class
    weights, as ``F.cross_entropy`` does, and is 0 where that is 0.
    """
    options = _options(SegmentationOptions, align_corners, ignore_index, reduction)
    check.check_maps("logits", logits, "K")
    batch, num_classes = logits.shape[:2]
    if teacher_logits is not None:
        check.check_maps("teacher_logits", teacher_logits, "K")
        check.check_pair("logits", logits, "teacher_logits", teacher_logits, channels=True)
        check.look_for_probabilities("teacher_logits", teacher_logits)
    check.check_labels(labels, batch, num_classes, logits)
    check.check_label_values(labels, num_classes, ignore_index)
    _say_that_a_class_is_ignored(num_classes, ignore_index)
    if class_weight is not None:
        check.check_class_weight(class_weight, num_classes, logits)
    check.check_number("task_weight", task_weight)
    check.check_number("kd_weight", kd_weight)
    check.check_temperature("temperature", temperature)
    check.check_number("label_smoothing", label_smoothing, below=1.0)
    normalizers = _normalizers(normalizer, ("task", "kd"), logits)
    logits, labels = savable(logits), savable(labels)
    teacher_logits, class_weight = savable(teacher_logits), savable(class_weight)
    chosen = backends.select(backend, str(logits.device))
    check.check_compute_dtype(chosen, logits=logits, teacher_logits=teacher_logits)
    if chosen == "reference":
        return reference.segmentation_loss(
            logits, labels, teacher_logits, task_weight=task_weight, kd_weight=kd_weight, temperature=temperature,
            class_weight=class_weight, label_smoothing=label_smoothing, align_corners=align_corners,
            ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, return_terms=return_terms,
        )  # fmt: skip
    terms = pixel_losses.segmentation_loss(
        logits, teacher_logits, labels, class_weight, options, temperature, task_weight, kd_weight, label_smoothing,
        normalizers, chosen,
    )  # fmt: skip
    return SegmentationTerms(*terms) if return_terms else terms[0]


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
    """What KMM and KEM do, as maps to look at: reliability S, hybrid logits z^h and weight W (sections 3 and 4).

    Args: as :func:`hakd_loss`. For pictures: it writes the maps out in full and gives no gradients.

    Returns:
        Three [B, K, loss grid] tensors, float32 (float64), 0 at ignored pixels.
    """
    options = HakdOptions(kmm, kem, "kl", resolution, align_corners, ignore_index)  # type: ignore[arg-type]
    _check_hakd(student_logits, teacher_logits, labels, options, 1.0, 1.0, 1.0)
    return reference.hakd_maps(
        student_logits, teacher_logits, labels, kmm=kmm, kem=kem, resolution=resolution,
        align_corners=align_corners, ignore_index=ignore_index,
    )  # fmt: skip
