"""The trained part of a run in one module: student, projectors and loss, ready for a single DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_kernels import HeteroAKDLoss, HeteroAKDOutput
from heteroakd.config.groups import LossConfig, Method
from heteroakd.data import IGNORE_INDEX
from heteroakd.methods.losses import AuxiliaryHead, Divisors, LogitLoss, MeanOverTaps, Terms, pair_names
from heteroakd.networks.taps import TappedNetwork, TappedOutput, probe

METHODS: tuple[Method, ...] = ("none", "kd", "cwd", "heteroakd", "heteroakd_no_kmm", "heteroakd_no_kem")


class Distiller(nn.Module):
    """A student and the loss it is trained with.

    The teacher is no part of it: it is frozen, and `Teacher` runs it. Its outputs are arguments here, so that this
    module holds all that is trained and nothing else.

    Args:
        student: network to train.
        loss: a `LogitLoss`, a `HeteroAKDLoss`, which brings its two projectors, or a `MeanOverTaps` of several.
        feature_sizes: (h, w) of the student's feature map at every tap for a training crop, which the divisors of
            `resolution="feature"` need.
        auxiliary: head on the feature map at the student's `auxiliary_tap`; no part of the student itself.
    """

    def __init__(
        self,
        student: TappedNetwork,
        loss: LogitLoss | HeteroAKDLoss | MeanOverTaps,
        feature_sizes: Sequence[tuple[int, int]] = (),
        auxiliary: AuxiliaryHead | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.feature_sizes = tuple(feature_sizes)
        self.auxiliary = auxiliary
        names = ("kd_weight", "cwd_weight", "hakd_weight")
        self._weights = [
            (module, name, float(getattr(module, name)))
            for module in loss.modules()
            for name in names
            if hasattr(module, name)
        ]
        self._compiled: Callable[[Tensor], TappedOutput] | None = None

    @property
    def pairs(self) -> list[HeteroAKDLoss]:
        """The HeteroAKD loss of every pair of taps; none for the other methods."""
        if isinstance(self.loss, MeanOverTaps):
            return cast(list[HeteroAKDLoss], list(self.loss.pairs))
        return [self.loss] if isinstance(self.loss, HeteroAKDLoss) else []

    def compile_student(self) -> None:
        """Run the student through torch.compile here; `student` itself stays as it is, for images of other sizes."""
        self._compiled = torch.compile(self.student.forward)

    def scale_distillation(self, factor: float) -> None:
        """Multiply the weights of the distillation terms, as they were at first, by a factor."""
        for module, name, weight in self._weights:
            setattr(module, name, weight * factor)

    def forward(
        self, images: Tensor, labels: Tensor, teacher: TappedOutput | None = None, normalizer: Divisors | None = None
    ) -> Terms:
        """One loss over a batch: images float [B, 3, H, W], labels int64 [B, H, W], the teacher's outputs for them.

        `normalizer` replaces the divisors of the terms' means, see `divisors`.

        Raises ValueError where the loss needs a teacher's outputs and none are given.
        """
        output: TappedOutput = (self._compiled or self.student)(images)
        terms = self._distil(output, labels, teacher, normalizer)
        if self.auxiliary is None:
            return terms
        if output.auxiliary is None:
            raise ValueError("an auxiliary head needs a student with an auxiliary_tap, got None")
        auxiliary = self.auxiliary(output.auxiliary, labels, normalizer=normalizer)
        return terms._replace(loss=terms.loss + auxiliary.loss, auxiliary=auxiliary.task)

    def _distil(
        self, output: TappedOutput, labels: Tensor, teacher: TappedOutput | None, normalizer: Divisors | None
    ) -> Terms:
        if isinstance(self.loss, LogitLoss):
            if teacher is None and (self.loss.kd_weight or self.loss.cwd_weight):
                raise ValueError("this loss distils and needs the teacher's outputs, got None")
            teacher_logits = None if teacher is None else teacher.logits
            return cast(Terms, self.loss(output.logits, labels, teacher_logits, normalizer=normalizer))
        if teacher is None:
            raise ValueError("HeteroAKDLoss needs the teacher's outputs, got None")
        logits = (output.logits, teacher.logits)
        if isinstance(self.loss, MeanOverTaps):
            return cast(Terms, self.loss(output.maps, teacher.maps, labels, *logits, normalizer=normalizer))
        one: HeteroAKDOutput = self.loss(output.features, teacher.features, labels, *logits, normalizer=normalizer)
        zero = torch.zeros_like(one.kd)
        return Terms(one.loss, one.task, one.kd, zero, one.hakd, one.proj, zero)

    def divisors(self, labels: Tensor) -> Divisors:
        """What the loss divides each term's sum by for labels [B, H, W]: 0-dim float64 tensors, without a device
        synchronisation. Added up over several batches they are, as `normalizer`, those of the joint batch."""
        valid = labels != IGNORE_INDEX
        count = valid.sum().double()
        loss = self.loss.logit_loss if isinstance(self.loss, MeanOverTaps) else self.loss
        task = count
        if loss.class_weight is not None:
            task = loss.class_weight.double()[torch.where(valid, labels, 0)].mul(valid).sum()
        divisors = {"task": task, "kd": count}
        if isinstance(loss, LogitLoss):
            divisors["cwd"] = torch.full_like(count, labels.shape[0])
        for number, pair in enumerate(self.pairs):
            hakd = proj = count
            if pair.resolution == "feature":
                sampled = F.interpolate(labels[:, None].float(), size=self.feature_sizes[number], mode="nearest")
                hakd = proj = (sampled != IGNORE_INDEX).sum().double()
            if pair.kem == "spatial":  # every image and class counts the same, however many pixels it has
                convolution = cast(nn.Conv2d, pair.student_projector[0])
                hakd = torch.full_like(count, labels.shape[0] * convolution.out_channels)
            names = pair_names(number, len(self.pairs))
            divisors[names["hakd"]], divisors[names["proj"]] = hakd, proj
        return divisors


class Teacher:
    """A frozen network in eval mode whose outputs carry no gradient.

    Not a module, so that no `train()`, optimiser, state_dict or DistributedDataParallel around it reaches the teacher.
    """

    def __init__(self, network: TappedNetwork) -> None:
        self.network = network.eval().requires_grad_(False)
        self._run: Callable[[Tensor], TappedOutput] = self.network

    def compile(self) -> None:
        """Run the network through torch.compile here; `network` itself stays as it is, for images of other sizes."""
        self._run = torch.compile(self.network.forward)

    @torch.no_grad()  # not inference_mode: autograd saves these features, and would have to copy them
    def __call__(self, images: Tensor) -> TappedOutput:
        """Features and logits for images float [B, 3, H, W]."""
        return self._run(images)


def build_distiller(
    student: TappedNetwork,
    teacher: Teacher | None,
    method: Method,
    config: LossConfig,
    num_classes: int,
    image_size: tuple[int, int],
    *,
    auxiliary_weight: float = 0.0,
) -> Distiller:
    """Student and loss of a method; channel counts for the projectors come from one image of `image_size` (H, W).

    With an `auxiliary_weight` the student must have an `auxiliary_tap`, on which a head is trained too.

    Raises ValueError for an unknown method, a missing teacher, class weights that are not K, networks of another number
    of classes, and other numbers of taps in student and teacher.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if config.class_weight is not None and len(config.class_weight) != num_classes:
        raise ValueError(f"loss.class_weight must hold {num_classes} values, got {len(config.class_weight)}")
    if method != "none" and teacher is None:
        raise ValueError(f"method {method!r} needs a teacher, got None")
    if not (math.isfinite(auxiliary_weight) and auxiliary_weight >= 0):
        raise ValueError(f"auxiliary_weight must be a finite number from 0 on, got {auxiliary_weight}")
    ours = probe(student, image_size)
    _check_classes("student" if teacher is not None else "network", ours.logits, num_classes)
    sizes = [(features.shape[2], features.shape[3]) for features in ours.maps]
    auxiliary = None
    if auxiliary_weight:  # before the projectors, so that all methods start with the same one
        if ours.auxiliary is None:
            raise ValueError("auxiliary_weight needs a network with an auxiliary_tap, got None")
        auxiliary = AuxiliaryHead(ours.auxiliary.shape[1], num_classes, auxiliary_weight, config)
    theirs = None if teacher is None else probe(teacher.network, image_size)
    if theirs is not None:
        _check_classes("teacher", theirs.logits, num_classes)
    if not method.startswith("heteroakd") or teacher is None or theirs is None:
        kd_weight = config.kd_weight if method == "kd" else 0.0
        cwd_weight = config.cwd_weight if method == "cwd" else 0.0
        return Distiller(student, LogitLoss(config, kd_weight=kd_weight, cwd_weight=cwd_weight), sizes, auxiliary)
    if len(ours.maps) != len(theirs.maps):
        raise ValueError(
            f"student.tap names {len(ours.maps)} modules ({', '.join(student.taps)}), teacher.tap "
            f"{len(theirs.maps)} ({', '.join(teacher.network.taps)}): they are paired in their order, so that there "
            "must be as many"
        )
    pairs = [
        _heteroakd_loss(ours.shape[1], theirs.shape[1], method, config, num_classes)
        for ours, theirs in zip(ours.maps, theirs.maps, strict=True)
    ]
    loss = pairs[0] if len(pairs) == 1 else MeanOverTaps(LogitLoss(config, kd_weight=config.kd_weight), pairs)
    return Distiller(student, loss, sizes, auxiliary)


def _check_classes(name: str, logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ValueError(f"the {name} must return logits of {num_classes} classes, got {tuple(logits.shape)}")


def _heteroakd_loss(
    student_channels: int, teacher_channels: int, method: Method, config: LossConfig, num_classes: int
) -> HeteroAKDLoss:
    return HeteroAKDLoss(
        student_channels,
        teacher_channels,
        num_classes,
        projector=config.projector,
        temperature=config.temperature,
        kd_temperature=config.kd_temperature,
        task_weight=config.task_weight,
        kd_weight=config.kd_weight,
        hakd_weight=config.hakd_weight,
        proj_weight=config.proj_weight,
        kmm=config.kmm and method != "heteroakd_no_kmm",
        kem="none" if method == "heteroakd_no_kem" else config.kem,
        divergence=config.divergence,
        resolution=config.resolution,
        align_corners=config.align_corners,
        logits_align_corners=config.logits_align_corners,
        ignore_index=IGNORE_INDEX,
        class_weight=None if config.class_weight is None else torch.tensor(config.class_weight),
        label_smoothing=config.label_smoothing,
        backend=config.backend,
    )
