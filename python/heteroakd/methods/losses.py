"""The losses of a run as modules: on output logits, on an auxiliary head, and HeteroAKD's over one or several taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from hetero_kernels import HeteroAKDLoss, functional
from heteroakd.config.groups import LossConfig
from heteroakd.data import IGNORE_INDEX

Divisors = dict[str, Tensor]
"""0-dim tensors by term: "task", "kd", "cwd", and for each HeteroAKD term what `pair_names` says."""


class Terms(NamedTuple):
    """0-dim tensors: the loss, which alone carries gradient, and its terms before their weights; 0 for absent ones."""

    loss: Tensor
    task: Tensor
    kd: Tensor
    cwd: Tensor
    hakd: Tensor
    proj: Tensor
    auxiliary: Tensor


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
        """Logits [B, K, h, w] and [B, K, h', w'], labels int [B, H, W]; of the terms, hakd, proj and
        auxiliary are 0."""
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
            return Terms(terms.loss, terms.task, terms.kd, zero, zero, zero, zero)
        images = None if normalizer is None else normalizer["cwd"]
        cwd = channel_wise_loss(logits, teacher_logits, config.cwd_temperature, config.logits_align_corners, images)
        return Terms(terms.loss + self.cwd_weight * cwd, terms.task, terms.kd, cwd.detach(), zero, zero, zero)


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
        self.loss = LogitLoss(replace(config, task_weight=weight), kd_weight=0.0)

    def forward(self, features: Tensor, labels: Tensor, *, normalizer: Divisors | None = None) -> Terms:
        """Feature map [B, C, h, w] and labels int [B, H, W] -> weighted loss, and `task`, which is not weighted."""
        return cast(Terms, self.loss(self.head(features), labels, None, normalizer=normalizer))


class MeanOverTaps(nn.Module):
    """HeteroAKD's objective with several pairs of feature maps: the terms of the output logits once, and the mean of
    the pairs' own terms, each pair with projectors of its own.

    Args:
        logit_loss: cross-entropy and KD on the output logits.
        pairs: a loss per pair of taps, in their order; only their HeteroAKD terms are used.
    """

    def __init__(self, logit_loss: LogitLoss, pairs: Sequence[HeteroAKDLoss]) -> None:
        super().__init__()
        self.logit_loss = logit_loss
        self.pairs = nn.ModuleList(pairs)

    def forward(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        labels: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        normalizer: Divisors | None = None,
    ) -> Terms:
        """Maps [B, C, h, w] by pair, labels int [B, H, W], logits [B, K, h', w'] -> the terms, hakd and proj as means.

        Raises ValueError where the numbers of maps are not that of the pairs.
        """
        terms: Terms = self.logit_loss(student_logits, labels, teacher_logits, normalizer=normalizer)
        outputs = []
        for number, (pair, ours, theirs) in enumerate(zip(self.pairs, student_maps, teacher_maps, strict=True)):
            divisors = None
            if normalizer is not None:
                divisors = {term: normalizer[name] for term, name in pair_names(number, len(self.pairs)).items()}
            outputs.append(pair(ours, theirs, labels, normalizer=divisors))
        loss, hakd, proj = (
            torch.stack([getattr(output, name) for output in outputs]).mean() for name in ("loss", "hakd", "proj")
        )
        return terms._replace(loss=terms.loss + loss, hakd=hakd, proj=proj)


def pair_names(number: int, count: int) -> dict[str, str]:
    """Names, in `Divisors`, of the terms "hakd" and "proj" of pair `number` of `count`; with one pair their own."""
    return {term: term if count == 1 else f"{term}.{number}" for term in ("hakd", "proj")}
