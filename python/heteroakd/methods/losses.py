"""Losses that the methods need beside those of `hetero_kernels`: channel-wise distillation, the auxiliary head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from hetero_kernels import SegmentationLoss, reference
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
