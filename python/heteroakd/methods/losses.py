"""What a run minimises: a method's criterion and perhaps an auxiliary head, as one criterion of a `Distiller`; and
losses beside those of `hetero_kernels`, channel-wise distillation and the auxiliary head's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from hetero_kernels import HeteroAKDLoss, SegmentationLoss, reference
from hetero_kernels.arguments import check_number, check_temperature
from heteroakd.config.groups import LossConfig
from heteroakd.data import IGNORE_INDEX

Divisors = dict[str, Tensor]
"""0-dim tensors by term, see `hetero_kernels.Distiller.divisors`."""


def segmentation_loss(config: LossConfig, *, task_weight: float, kd_weight: float) -> SegmentationLoss:
    """Cross-entropy and KD on output logits by the run's options."""
    return SegmentationLoss(
        task_weight=task_weight,
        kd_weight=kd_weight,
        temperature=config.kd_temperature,
        class_weight=None if config.class_weight is None else torch.tensor(config.class_weight),
        label_smoothing=config.label_smoothing,
        align_corners=config.logits_align_corners,
        ignore_index=IGNORE_INDEX,
        backend=config.backend,
    )


def channel_wise_loss(
    student: Tensor, teacher: Tensor, temperature: float, align_corners: bool, images: Tensor | None = None
) -> Tensor:
    """Channel-wise distillation (Shu et al., ICCV 2021) of logits [B, K, h, w], the teacher's, a constant, brought to
    the student's grid: T^2 KL of the classes' softmaxes over all positions, a mean over images and classes. `images`
    replaces B.

    Positions of -inf have no mass and contribute 0; so does a class that the teacher has at -inf everywhere. Raises
    TypeError or ValueError for a temperature that is no number in [1e-6, 1e6].
    """
    check_temperature("temperature", temperature)
    batch, num_classes, height, width = student.shape
    teacher = reference.to_grid(teacher.detach().to(student.dtype), (height, width), align_corners)
    ours, theirs = (logits.float().flatten(2) / temperature for logits in (student, teacher))
    ours_nowhere, nowhere = ((z == float("-inf")).all(2, keepdim=True) for z in (ours, theirs))
    ours = ours.masked_fill(ours_nowhere, 0.0).log_softmax(2).masked_fill(ours_nowhere, float("-inf"))
    theirs = theirs.masked_fill(nowhere, 0.0).log_softmax(2)
    divergence = reference.weighted_by(theirs.exp().masked_fill(nowhere, 0.0), theirs - ours).sum()
    return temperature**2 * divergence / (num_classes * (batch if images is None else images))


class ChannelWiseOutput(NamedTuple):
    """0-dim tensors: the loss, which alone carries gradient, and its terms before their weights."""

    loss: Tensor
    task: Tensor
    cwd: Tensor


class ChannelWiseLoss(nn.Module):
    """Cross-entropy and channel-wise distillation, a criterion of `hetero_kernels.Distiller`."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.task = segmentation_loss(config, task_weight=config.task_weight, kd_weight=0.0)
        self.cwd_weight = config.cwd_weight
        self.temperature = config.cwd_temperature

    def forward(
        self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor, *, normalizer: Divisors | None = None
    ) -> ChannelWiseOutput:
        """Logits [B, K, h, w] and [B, K, h', w'], labels int [B, H, W]."""
        check_number("cwd_weight", self.cwd_weight)
        own = None if normalizer is None else {"task": normalizer["task"]}
        task = self.task(student_logits, labels, normalizer=own)
        images = None if normalizer is None else normalizer["cwd"]
        cwd = channel_wise_loss(student_logits, teacher_logits, self.temperature, self.task.align_corners, images)
        return ChannelWiseOutput(task.loss + self.cwd_weight * cwd, task.task, cwd.detach())

    def divisors(self, labels: Tensor) -> Divisors:
        """As those of `SegmentationLoss`; channel-wise distillation counts images."""
        own = self.task.divisors(labels)
        return {"task": own["task"], "cwd": torch.full_like(own["task"], labels.shape[0])}


class AuxiliaryHead(nn.Module):
    """An FCN head on a feature map inside the network, for training alone: its cross-entropy times a weight.

    Args:
        channels: C of the feature map. num_classes: K.
        weight: factor on the cross-entropy.
        config: class weights, label smoothing, interpolation and backend, as for the network's own logits.
    """

    def __init__(self, channels: int, num_classes: int, weight: float, config: LossConfig) -> None:
        super().__init__()
        self.head = FCNHead(channels, num_classes)
        self.weight = weight
        self.loss = segmentation_loss(config, task_weight=weight, kd_weight=0.0)

    def forward(self, features: Tensor, labels: Tensor, *, normalizer: Divisors | None = None) -> tuple[Tensor, Tensor]:
        """Feature map [B, C, h, w] and labels int [B, H, W] -> the loss, and the cross-entropy without its weight."""
        own = None if normalizer is None else {"task": normalizer["task"]}
        terms = self.loss(self.head(features), labels, normalizer=own)
        return terms.loss, terms.task


DISTILLATION_WEIGHTS = ("kd_weight", "cwd_weight", "hakd_weight")
"""What a warm-up of the distillation scales."""


class Terms(NamedTuple):
    """0-dim tensors: the loss, which alone carries gradient, and its terms before their weights; 0 for absent ones."""

    loss: Tensor
    task: Tensor
    kd: Tensor
    cwd: Tensor
    hakd: Tensor
    proj: Tensor
    auxiliary: Tensor


TERMS = Terms._fields


class Objective(nn.Module):
    """A criterion whose output is the trainer's `Terms`.

    Args:
        criterion: the method's: a `SegmentationLoss`, `ChannelWiseLoss`, `HeteroAKDLoss` or `MeanOverTaps`.
        feature_sizes: (h, w), for a training crop, of the student's maps that the criterion takes, which are the
            first ones; none where it takes no maps.
        auxiliary: head on one of the student's tapped maps. auxiliary_map: which.
    """

    def __init__(
        self,
        criterion: nn.Module,
        feature_sizes: Sequence[tuple[int, int]] = (),
        auxiliary: AuxiliaryHead | None = None,
        auxiliary_map: int = -1,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.auxiliary, self.auxiliary_map = auxiliary, auxiliary_map
        self.feature_sizes = tuple(feature_sizes)
        self._weights = [
            (module, name, float(getattr(module, name)))
            for module in criterion.modules()
            for name in DISTILLATION_WEIGHTS
            if hasattr(module, name)
        ]

    @property
    def pairs(self) -> list[HeteroAKDLoss]:
        """The HeteroAKD loss of every pair of taps; none for the other methods."""
        return [module for module in self.criterion.modules() if isinstance(module, HeteroAKDLoss)]

    def warm_up(self, factor: float) -> None:
        """Multiply the weights of the distillation terms, as they were at first, by a factor."""
        for module, name, weight in self._weights:
            setattr(module, name, weight * factor)

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        teacher_logits: Tensor | None = None,
        *,
        normalizer: Divisors | None = None,
    ) -> Terms:
        """Logits [B, K, h, w], labels int [B, H, W], feature maps [B, C, h, w] at the taps -> the terms.

        `normalizer` replaces the divisors of the terms' means, see `divisors`.
        """
        given: dict[str, Any] = {"student_logits": student_logits, "labels": labels, "normalizer": normalizer}
        if teacher_logits is not None:
            given["teacher_logits"] = teacher_logits
        if self.feature_sizes:
            given["student_features"] = self._taken(student_features[: len(self.feature_sizes)])
            given["teacher_features"] = self._taken(teacher_features)
        found = self.criterion(**given)
        zero = torch.zeros_like(found.task)
        terms = Terms(*(getattr(found, name, zero) for name in TERMS))
        if self.auxiliary is None:
            return terms
        loss, auxiliary = self.auxiliary(student_features[self.auxiliary_map], labels, normalizer=normalizer)
        return terms._replace(loss=terms.loss + loss, auxiliary=auxiliary)

    def divisors(self, labels: Tensor) -> Divisors:
        """What `forward` divides each term's sum by for labels [B, H, W] of a training crop."""
        sizes = [self._taken(self.feature_sizes)] if self.feature_sizes else []
        return cast(Divisors, cast(Any, self.criterion).divisors(labels, *sizes))

    def _taken(self, of_taps: Sequence[Any]) -> Any:
        """What is there for each tap as the criterion takes it: `HeteroAKDLoss` has one, `MeanOverTaps` several."""
        return of_taps[0] if isinstance(self.criterion, HeteroAKDLoss) else tuple(of_taps)
