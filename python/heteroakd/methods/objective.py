"""What a run minimises: a method's criterion and perhaps an auxiliary head, as one criterion of a `Distiller`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hetero_kernels import HeteroAKDLoss
from heteroakd.methods.losses import AuxiliaryHead, Divisors

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
            ours = tuple(student_features[: len(self.feature_sizes)])
            one = isinstance(self.criterion, HeteroAKDLoss)
            given["student_features"] = ours[0] if one else ours
            given["teacher_features"] = teacher_features[0] if one else tuple(teacher_features)
        found = self.criterion(**given)
        zero = torch.zeros_like(found.task)
        terms = Terms(*(getattr(found, name, zero) for name in TERMS))
        if self.auxiliary is None:
            return terms
        loss, auxiliary = self.auxiliary(student_features[self.auxiliary_map], labels, normalizer=normalizer)
        return terms._replace(loss=terms.loss + loss, auxiliary=auxiliary)

    def divisors(self, labels: Tensor) -> Divisors:
        """What `forward` divides each term's sum by for labels [B, H, W] of a training crop."""
        criterion = cast(Any, self.criterion)
        if not self.feature_sizes:
            return cast(Divisors, criterion.divisors(labels))
        one = isinstance(criterion, HeteroAKDLoss)
        return cast(Divisors, criterion.divisors(labels, self.feature_sizes[0] if one else self.feature_sizes))
