"""The drop-in modules: a projector per network, the whole HeteroAKD objective, and its part on output logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import arguments as check
from . import functional, projection, reference
from .options import HakdOptions, SegmentationOptions, check_backend, check_option
from .reference import Normalizer, SegmentationTerms


class HeteroAKDOutput(NamedTuple):
    """What :class:`HeteroAKDLoss` returns: 0-dim tensors, the terms unweighted and detached.

    ``task`` is 0 where no student logits were given, ``kd`` where student or teacher logits were not.
    """

    loss: Tensor
    task: Tensor
    kd: Tensor
    hakd: Tensor
    proj: Tensor


class PixelProjector(nn.Sequential):
    """1x1 convolution of a network's features into the aligned logit space (section 1): [B, C, h, w] -> [B, K, h, w].

    Args:
        in_channels: C. num_classes: K.
        projector: "conv_bn" (default), "conv_bn_relu" (the paper's) or "conv". After a ReLU sigma(z) >= 1/2, so a
            projector could never say that a class is absent: hence the default without it.
        backend: None (the kernels where they can) or "reference": torch's layers, which have every kind of derivative.
    """

    backend: str | None = None

    def __init__(
        self, in_channels: int, num_classes: int, projector: str = "conv_bn", *, backend: str | None = None
    ) -> None:
        check_option("projector", projector)
        check_backend(backend)
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an int >= 1")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, num_classes, 1, bias=projector == "conv")]
        if projector != "conv":
            layers.append(nn.BatchNorm2d(num_classes))
        if projector == "conv_bn_relu":
            layers.append(nn.ReLU())
        super().__init__(*layers)
        self.backend = backend

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C, h, w] -> logits [B, K, h, w], in the region's dtype under ``torch.autocast``, else in the one
        that features and weights promote to; gradients come back in the dtypes of the inputs.

        Pixels that reach no loss (ignored ones) contribute exactly 0 to all gradients, even NaN and inf, unless a batch
        norm in training mode takes its statistics from them or a layer was replaced or hooked.

        The kernels of the backends "cpu", "cuda" and "triton" read the features once here and once in the backward,
        which has no second derivative. In float64 on a GPU, under transforms of torch.func and in forward mode torch's
        layers run.
        Layers that are hooked, parametrized or of other classes than this one makes are torch's to run; a
        ``RuntimeWarning`` says so once.

        Raises:
            TypeError, ValueError: features or parameters of another dtype or shape than the module can compute with.
        """
        _check_projector("features", features, "", self)
        projected = projection.run(self, features, self.backend)
        if isinstance(projected, Tensor):
            return projected
        conv: Any = self[0]
        return projected.normalized(projection.dtype_of(features, conv.weight))


def _check_projector(name: str, features: Tensor, owner: str, projector: nn.Module) -> None:
    """Raises where ``projector``, whose parameters' names begin with ``owner``, cannot take ``features``.

    Of what wraps a projector (FSDP, DistributedDataParallel, torch.compile) only the wrapper knows the layers: their
    parameters may be elsewhere.
    """
    check.check_maps(name, features, "C")
    if not (isinstance(projector, nn.Sequential) or type(projector) is nn.Conv2d):
        return
    conv: Any
    conv, *others = projection.children_of(projector)
    if features.shape[1] != conv.in_channels:
        hint = f"; is it [B, h, w, C]? use {name}.permute(0, 3, 1, 2)" if features.shape[3] == conv.in_channels else ""
        raise ValueError(f"{name} is {list(features.shape)}, expected {conv.in_channels} channels as constructed{hint}")
    for parameter_name, parameter in projector.named_parameters():
        check.check_floating(owner + parameter_name, parameter)
        check.check_device(owner + parameter_name, parameter, features)
    norm: Any = others[0] if others else None
    if not projection.is_batch_norm(norm) or norm.weight is None or not projection.uses_the_batch(norm):
        return
    dtype, has = projection.dtype_of(features, conv.weight), norm.weight.dtype
    if dtype != has and not (has == torch.float32 and dtype.itemsize == 2):
        raise TypeError(
            f"{name} is {features.dtype} and {owner}0.weight {conv.weight.dtype}: their projection is {dtype}, which "
            f"batch norm in training mode with {owner}1.weight {has} cannot take; expected {has} {name}"
        )


_KNOWN_FORWARDS = (nn.Sequential.forward, PixelProjector.forward, nn.Conv2d.forward)


def _as_convolution(projector: nn.Module) -> projection.Convolution | None:
    """The one 1x1 convolution that ``projector`` is, or None."""
    known = isinstance(projector, (nn.Sequential, nn.Conv2d)) and type(projector).forward in _KNOWN_FORWARDS
    head = projection.convolution_of(projector) if known and not projection.is_changed(projector) else None
    return None if head is None or head.rest else head


def _projected(
    owner: str, projector: nn.Module, features: Tensor, num_classes: int, backend: str | None
) -> functional.Projection:
    """What :func:`functional.hakd_loss_of_projections` takes for a network whose projector is called ``owner``."""
    # A subclass may have a forward of its own. A bare convolution is what a projector "conv" has in it.
    ours = isinstance(projector, PixelProjector) and type(projector).forward is PixelProjector.forward
    if (ours or type(projector) is nn.Conv2d) and not projection.is_changed(projector):
        projected = projection.run(projector, features, backend)
    else:
        projected = projector(features)
    logits = projected.logits if isinstance(projected, projection.Projected) else projected
    if isinstance(logits, Tensor) and logits.dim() == 4 and logits.shape[1] != num_classes:
        raise ValueError(f"{owner} returned {list(logits.shape)}, expected {num_classes} classes as constructed")
    if isinstance(projected, projection.Projected):
        return projected.logits, projected.scale, projected.shift, projected.relu
    return projected


def _for_terms(normalizer: Normalizer, terms: tuple[str, ...]) -> Normalizer:
    if isinstance(normalizer, Mapping):
        return {term: normalizer[term] for term in terms if term in normalizer}
    return normalizer


def _register_class_weight(module: nn.Module, class_weight: Any, size: int | None) -> None:
    if class_weight is not None:
        class_weight = torch.as_tensor(class_weight, dtype=torch.get_default_dtype()).detach().clone()
        check.check_vector("class_weight", class_weight, class_weight.numel() if size is None else size, class_weight)
    module.register_buffer("class_weight", class_weight, persistent=False)


def _count(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels.long() != ignore_index).sum().double()


def _logit_divisors(labels: Tensor, ignore_index: int, class_weight: Tensor | None) -> dict[str, Tensor]:
    """Divisors of the terms on output logits (section 7)."""
    task = count = _count(labels, ignore_index)
    if class_weight is not None:
        labels = labels.long()
        known = labels.clamp(0, len(class_weight) - 1)  # wrong ones are the loss's to report
        task = class_weight.double()[known].mul(labels != ignore_index).sum()
    return {"task": task, "kd": count}


class SegmentationLoss(nn.Module):
    """Cross-entropy and logit distillation (section 7) as a module: HeteroAKD without its own terms, and with
    ``kd_weight=0`` a plain ``nn.CrossEntropyLoss`` on coarse logits.

    Args:
        task_weight, kd_weight: numbers >= 0, also settable as attributes at every step.
        temperature: T > 0 of the distillation.
        class_weight: [K] or None, kept as a buffer that is in no state_dict. label_smoothing: in [0, 1).
        align_corners, ignore_index: see :class:`hetero_kernels.options.SegmentationOptions`.
        backend: None (automatic), "reference", "cpu", "cuda" or "triton".

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 0.1,
        temperature: float = 1.0,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        ignore_index: int = 255,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        SegmentationOptions(align_corners, ignore_index)
        check_backend(backend)
        check.check_temperature("temperature", temperature)
        check.check_number("label_smoothing", label_smoothing, below=1.0)
        check.check_number("task_weight", task_weight)
        check.check_number("kd_weight", kd_weight)
        _register_class_weight(self, class_weight, None)
        self.task_weight, self.kd_weight, self.temperature = task_weight, kd_weight, temperature
        self.label_smoothing, self.align_corners = label_smoothing, align_corners
        self.ignore_index, self.backend = ignore_index, backend

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, weights: task={self.task_weight}, kd={self.kd_weight}; "
            f"ignore_index={self.ignore_index}"
        )

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> SegmentationTerms:
        """:func:`hetero_kernels.functional.segmentation_loss` of student_logits [B, K, h, w], labels [B, H, W] and, for
        the distillation, teacher_logits [B, K, h', w']: the loss, and ``task`` and ``kd``, unweighted and detached."""
        return cast(SegmentationTerms, functional.segmentation_loss(
            student_logits, labels, teacher_logits, task_weight=self.task_weight, kd_weight=self.kd_weight,
            temperature=self.temperature, class_weight=self.class_weight, label_smoothing=self.label_smoothing,
            align_corners=self.align_corners, ignore_index=self.ignore_index, normalizer=normalizer,
            return_terms=True, backend=self.backend,
        ))  # fmt: skip

    def divisors(self, labels: Tensor) -> dict[str, Tensor]:
        """As :meth:`HeteroAKDLoss.divisors`, for the terms "task" and "kd"."""
        return _logit_divisors(labels, self.ignore_index, self.class_weight)


class HeteroAKDLoss(nn.Module):
    """HeteroAKD's training objective (section 8) behind one call.

    ``task_weight * CE + kd_weight * KD + hakd_weight * L_hakd + proj_weight * L_proj``. The first two act on the
    networks' output logits, the last two on features of both networks, projected by :class:`PixelProjector`. Hand
    the module's parameters to the optimiser beside the student's: the projectors learn.

    Args:
        student_channels, teacher_channels: Cs and Ct of the features. num_classes: K.
        projector: see :class:`PixelProjector`.
        temperature, kd_temperature: T > 0 of the HeteroAKD term and of the logit distillation.
        task_weight, kd_weight, hakd_weight, proj_weight: numbers >= 0, also settable as attributes at every step.
        kmm, kem, divergence, resolution, align_corners, ignore_index: see
            :class:`hetero_kernels.options.HakdOptions`.
        logits_align_corners: ``align_corners`` of the output logits' interpolation.
        class_weight: [K] or None, kept as a buffer that is in no state_dict: an option like the others.
        label_smoothing: in [0, 1); both as ``F.cross_entropy``.
        backend: None (automatic), "reference", "cpu", "cuda" or "triton".

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        num_classes: int,
        *,
        projector: str = "conv_bn",
        temperature: float = 1.0,
        kd_temperature: float = 1.0,
        task_weight: float = 1.0,
        kd_weight: float = 0.1,
        hakd_weight: float = 1.0,
        proj_weight: float = 1.0,
        kmm: bool = True,
        kem: str = "class",
        divergence: str = "kl",
        resolution: str = "label",
        align_corners: bool = False,
        logits_align_corners: bool = False,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        HakdOptions(kmm, kem, divergence, resolution, align_corners, ignore_index)  # type: ignore[arg-type]
        check.check_temperature("temperature", temperature)
        check.check_temperature("kd_temperature", kd_temperature)
        check.check_number("label_smoothing", label_smoothing, below=1.0)
        weights = {"task": task_weight, "kd": kd_weight, "hakd": hakd_weight, "proj": proj_weight}
        for name, weight in weights.items():
            check.check_number(f"{name}_weight", weight)
        self.num_classes = num_classes
        self.student_projector = PixelProjector(student_channels, num_classes, projector, backend=backend)
        self.teacher_projector = PixelProjector(teacher_channels, num_classes, projector, backend=backend)
        _register_class_weight(self, class_weight, num_classes)
        self.task_weight, self.kd_weight = task_weight, kd_weight
        self.hakd_weight, self.proj_weight = hakd_weight, proj_weight
        self.temperature, self.kd_temperature = temperature, kd_temperature
        self.kmm, self.kem, self.divergence, self.resolution = kmm, kem, divergence, resolution
        self.align_corners, self.logits_align_corners = align_corners, logits_align_corners
        self.ignore_index, self.label_smoothing, self.backend = ignore_index, label_smoothing, backend

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, kd_temperature={self.kd_temperature}, weights: task={self.task_weight}, "
            f"kd={self.kd_weight}, hakd={self.hakd_weight}, proj={self.proj_weight}; kmm={self.kmm}, kem={self.kem!r}, "
            f"divergence={self.divergence!r}, resolution={self.resolution!r}, ignore_index={self.ignore_index}"
        )

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        labels: Tensor,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> HeteroAKDOutput:
        """The objective of one batch; grids, strides and dtypes may all differ.

        Args:
            student_features: [B, Cs, hs, ws]. teacher_features: [B, Ct, ht, wt]. Of other dtypes than the projectors'
                parameters they are projected as :meth:`PixelProjector.forward` says.
            labels: int64, int32 or uint8 [B, H, W].
            student_logits: [B, K, h, w] or None. teacher_logits: [B, K, h', w'] or None, a constant.
            normalizer: 0-dim tensor that replaces every term's divisor, or a mapping with keys among "task", "kd",
                "hakd" and "proj"; see :func:`hetero_kernels.functional.hakd_loss`.

        Returns:
            :class:`HeteroAKDOutput`; only ``.loss`` carries gradient.

        Raises:
            as :func:`hetero_kernels.functional.hakd_loss`.
        """
        for name, features, projector in (
            ("student_features", student_features, self.student_projector),
            ("teacher_features", teacher_features, self.teacher_projector),
        ):
            _check_projector(name, features, f"{name.removesuffix('features')}projector.", projector)
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if logits is not None:
                check.check_maps(name, logits, "K")
                if logits.shape[1] != self.num_classes:
                    raise ValueError(
                        f"{name} is {list(logits.shape)}, expected {self.num_classes} classes as constructed"
                    )
        check.split_normalizer(normalizer, ("task", "kd", "hakd", "proj"), student_features)
        distilled = self._distil(student_features, teacher_features, labels, _for_terms(normalizer, ("hakd", "proj")))
        loss, hakd, proj = distilled
        return self.with_logits(loss, hakd, proj, student_logits, labels, teacher_logits, normalizer)

    def with_logits(
        self, loss: Tensor, hakd: Tensor, proj: Tensor, student_logits: Tensor | None, labels: Tensor,
        teacher_logits: Tensor | None, normalizer: Normalizer,
    ) -> HeteroAKDOutput:  # fmt: skip
        """The terms on features, and to them those on the output logits, where these are given."""
        if student_logits is None:
            zero = torch.zeros_like(hakd)
            return HeteroAKDOutput(loss, zero, zero, hakd, proj)
        segmented = cast(SegmentationTerms, functional.segmentation_loss(
            student_logits, labels, teacher_logits, task_weight=self.task_weight, kd_weight=self.kd_weight,
            temperature=self.kd_temperature, class_weight=self.class_weight, label_smoothing=self.label_smoothing,
            align_corners=self.logits_align_corners, ignore_index=self.ignore_index,
            normalizer=_for_terms(normalizer, ("task", "kd")), return_terms=True, backend=self.backend,
        ))  # fmt: skip
        return HeteroAKDOutput(loss + segmented.loss, segmented.task, segmented.kd, hakd, proj)

    @property
    def needs_feature_size(self) -> bool:
        """Whether :meth:`divisors` depends on the student's feature grid."""
        return self.resolution == "feature"

    def divisors(self, labels: Tensor, feature_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What :meth:`forward` divides each term's sum by: 0-dim float64 tensors "task", "kd", "hakd" and "proj", for
        joint batches as :meth:`Distiller.divisors` says. Nothing waits for the device.

        Args:
            labels: [B, H, W] as in :meth:`forward`. feature_size: (hs, ws) of the student's features, which
                ``resolution="feature"`` needs.
        """
        divisors = _logit_divisors(labels, self.ignore_index, self.class_weight)
        hakd = proj = divisors["kd"]
        if self.resolution == "feature":
            if feature_size is None:
                raise ValueError("feature_size is None, expected (hs, ws): resolution='feature' counts pixels there")
            hakd = proj = _count(reference.sample_labels(labels, (feature_size[0], feature_size[1])), self.ignore_index)
        if self.kem == "spatial":  # every image and class counts the same, however many pixels it has
            hakd = torch.full_like(hakd, max(labels.shape[0], 1) * self.num_classes)
        return {**divisors, "hakd": hakd, "proj": proj}

    def _distil(
        self, student_features: Tensor, teacher_features: Tensor, labels: Tensor, normalizer: Normalizer
    ) -> Tensor | functional.HakdTerms:
        """The terms on projected features, in one pass over the features where that is possible."""
        options: dict[str, Any] = dict(
            temperature=self.temperature, kmm=self.kmm, kem=self.kem, divergence=self.divergence,
            hakd_weight=self.hakd_weight, proj_weight=self.proj_weight, resolution=self.resolution,
            align_corners=self.align_corners, ignore_index=self.ignore_index, normalizer=normalizer,
            return_terms=True, backend=self.backend,
        )  # fmt: skip
        same_grid = student_features.shape[2:] == teacher_features.shape[2:]
        if self.resolution == "feature" and same_grid and self.kem != "spatial":
            student, teacher = _as_convolution(self.student_projector), _as_convolution(self.teacher_projector)
            fits = all(c is not None and c.weight.shape[0] == self.num_classes for c in (student, teacher))
            if fits and student is not None and teacher is not None:
                return functional.projected_hakd_loss(
                    student_features, teacher_features, student.weight.flatten(1), teacher.weight.flatten(1), labels,
                    student_bias=student.bias, teacher_bias=teacher.bias, **options,
                )  # fmt: skip
        return functional.hakd_loss_of_projections(
            _projected("student_projector", self.student_projector, student_features, self.num_classes, self.backend),
            _projected("teacher_projector", self.teacher_projector, teacher_features, self.num_classes, self.backend),
            labels, **options,
        )  # fmt: skip
