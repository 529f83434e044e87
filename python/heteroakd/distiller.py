"""The trained part of a run in one module: student, projectors and loss, ready for a single DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_kernels import HeteroAKDLoss, HeteroAKDOutput, functional
from heteroakd.config import LossConfig, Method
from heteroakd.data import IGNORE_INDEX
from heteroakd.models import TappedNetwork, TappedOutput, probe

METHODS: tuple[Method, ...] = ("none", "kd", "cwd", "heteroakd", "heteroakd_no_kmm", "heteroakd_no_kem")
Divisors = dict[str, Tensor]
"""0-dim tensors by term ("task", "kd", "cwd", "hakd", "proj")."""


class Terms(NamedTuple):
    """0-dim tensors: the loss, which alone carries gradient, and its terms before their weights; 0 for absent ones."""

    loss: Tensor
    task: Tensor
    kd: Tensor
    cwd: Tensor
    hakd: Tensor
    proj: Tensor


def channel_wise_loss(
    student: Tensor, teacher: Tensor, temperature: float, align_corners: bool, images: Tensor | None = None
) -> Tensor:
    """Channel-wise distillation (Shu et al., ICCV 2021) of logits [B, K, h, w], the teacher's brought to the student's
    grid: T^2 KL of the classes' softmaxes over all positions, a mean over images and classes. `images` replaces B."""
    batch, num_classes = student.shape[:2]
    teacher = teacher.to(student.dtype)
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.interpolate(teacher, size=student.shape[2:], mode="bilinear", align_corners=align_corners)
    ours, theirs = (F.log_softmax(logits.float().flatten(2) / temperature, 2) for logits in (student, teacher))
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * divergence / (num_classes * (batch if images is None else images))


class LogitLoss(nn.Module):
    """Losses on output logits: cross-entropy with the labels (method none) and KD (method kd) as in spec section 7, or
    channel-wise distillation (method cwd)."""

    class_weight: Tensor | None

    def __init__(self, config: LossConfig, *, kd_weight: float, cwd_weight: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.kd_weight = kd_weight
        self.cwd_weight = cwd_weight
        weight = None if config.class_weight is None else torch.tensor(config.class_weight)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, *, normalizer: Divisors | None = None
    ) -> Terms:
        """Logits [B, K, h, w] and [B, K, h', w'], labels int [B, H, W]; of the terms, hakd and proj are 0."""
        config = self.config
        terms = cast(
            functional.SegmentationTerms,
            functional.segmentation_loss(
                logits,
                labels,
                teacher_logits if self.kd_weight else None,
                task_weight=config.task_weight,
                kd_weight=self.kd_weight,
                temperature=config.kd_temperature,
                class_weight=self.class_weight,
                label_smoothing=config.label_smoothing,
                align_corners=config.logits_align_corners,
                ignore_index=IGNORE_INDEX,
                normalizer=None if normalizer is None else {term: normalizer[term] for term in ("task", "kd")},
                return_terms=True,
                backend=config.backend,
            ),
        )
        zero = torch.zeros_like(terms.task)
        if not self.cwd_weight or teacher_logits is None:
            return Terms(terms.loss, terms.task, terms.kd, zero, zero, zero)
        images = None if normalizer is None else normalizer["cwd"]
        cwd = channel_wise_loss(logits, teacher_logits, config.cwd_temperature, config.logits_align_corners, images)
        return Terms(terms.loss + self.cwd_weight * cwd, terms.task, terms.kd, cwd.detach(), zero, zero)


class Distiller(nn.Module):
    """A student and the loss it is trained with.

    The teacher is no part of it: it is frozen, and `Teacher` runs it. Its outputs are arguments here, so that this
    module holds all that is trained and nothing else.

    Args:
        student: network to train.
        loss: a `LogitLoss` or a `HeteroAKDLoss`, which brings its two projectors.
        feature_size: (h, w) of the student's features of a training crop; `divisors` needs it for a HeteroAKD term at
            feature resolution.
    """

    def __init__(
        self, student: TappedNetwork, loss: LogitLoss | HeteroAKDLoss, feature_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.feature_size = feature_size
        self._weights = {
            name: getattr(loss, name) for name in ("kd_weight", "cwd_weight", "hakd_weight") if hasattr(loss, name)
        }
        self._compiled: Callable[[Tensor], TappedOutput] | None = None

    def compile_student(self) -> None:
        """Run the student through torch.compile here; `student` itself stays as it is, for images of other sizes."""
        self._compiled = torch.compile(self.student.forward)

    def scale_distillation(self, factor: float) -> None:
        """Multiply the weights of the distillation terms, as they were at first, by a factor."""
        for name, weight in self._weights.items():
            setattr(self.loss, name, weight * factor)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        teacher: TappedOutput | None = None,
        normalizer: Divisors | None = None,
    ) -> Terms:
        """One loss over a batch: images float [B, 3, H, W], labels int64 [B, H, W], the teacher's outputs for them.

        `normalizer` replaces the divisors of the terms' means, see `divisors`.

        Raises ValueError where the loss needs a teacher's outputs and none are given.
        """
        features, logits = (self._compiled or self.student)(images)
        if isinstance(self.loss, LogitLoss):
            if teacher is None and (self.loss.kd_weight or self.loss.cwd_weight):
                raise ValueError("this loss distils and needs the teacher's outputs, got None")
            teacher_logits = None if teacher is None else teacher.logits
            return cast(Terms, self.loss(logits, labels, teacher_logits, normalizer=normalizer))
        if teacher is None:
            raise ValueError("HeteroAKDLoss needs the teacher's outputs, got None")
        output: HeteroAKDOutput = self.loss(
            features, teacher.features, labels, logits, teacher.logits, normalizer=normalizer
        )
        return Terms(output.loss, output.task, output.kd, torch.zeros_like(output.kd), output.hakd, output.proj)

    def divisors(self, labels: Tensor) -> Divisors:
        """What the loss divides each term's sum by for labels [B, H, W]: 0-dim float64 tensors, without a device
        synchronisation. Added up over several batches they are, as `normalizer`, those of the joint batch."""
        valid = labels != IGNORE_INDEX
        count = valid.sum().double()
        task = count
        if self.loss.class_weight is not None:
            task = self.loss.class_weight.double()[torch.where(valid, labels, 0)].mul(valid).sum()
        divisors = {"task": task, "kd": count}
        if isinstance(self.loss, LogitLoss):
            divisors["cwd"] = torch.full_like(count, labels.shape[0])
        if isinstance(self.loss, HeteroAKDLoss):
            divisors["hakd"] = divisors["proj"] = count
            if self.loss.resolution == "feature":
                sampled = F.interpolate(labels[:, None].float(), size=self.feature_size, mode="nearest")
                divisors["hakd"] = divisors["proj"] = (sampled != IGNORE_INDEX).sum().double()
            if self.loss.kem == "spatial":  # every image and class counts the same, however many pixels it has
                convolution = cast(nn.Conv2d, self.loss.student_projector[0])
                divisors["hakd"] = torch.full_like(count, labels.shape[0] * convolution.out_channels)
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
) -> Distiller:
    """Student and loss of a method; channel counts for the projectors come from one image of `image_size` (H, W).

    Raises ValueError for an unknown method, a missing teacher, and class weights that are not K.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if config.class_weight is not None and len(config.class_weight) != num_classes:
        raise ValueError(f"loss.class_weight must hold {num_classes} values, got {len(config.class_weight)}")
    if method != "none" and teacher is None:
        raise ValueError(f"method {method!r} needs a teacher, got None")
    if not method.startswith("heteroakd") or teacher is None:
        kd_weight = config.kd_weight if method == "kd" else 0.0
        cwd_weight = config.cwd_weight if method == "cwd" else 0.0
        return Distiller(student, LogitLoss(config, kd_weight=kd_weight, cwd_weight=cwd_weight))
    features = probe(student, image_size).features
    loss = HeteroAKDLoss(
        features.shape[1],
        probe(teacher.network, image_size).features.shape[1],
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
    return Distiller(student, loss, (features.shape[2], features.shape[3]))
