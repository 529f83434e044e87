"""The training methods, an object each; nobody else knows what a method's name means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from hetero_kernels import Distiller, HeteroAKDLoss, MeanOverTaps
from hetero_kernels.taps import Tapped
from heteroakd.config.groups import LossConfig
from heteroakd.data import IGNORE_INDEX
from heteroakd.methods.losses import AuxiliaryHead, ChannelWiseLoss, segmentation_loss
from heteroakd.methods.objective import TERMS as TERMS
from heteroakd.methods.objective import Objective as Objective
from heteroakd.methods.objective import Terms as Terms
from heteroakd.networks.shapes import probe, tap_paths

Channels = Sequence[tuple[int, int]]
"""Of student and teacher at every pair of taps."""


@dataclass(frozen=True)
class Method:
    """A way to train a student."""

    criterion: Callable[[LossConfig, int, Channels], nn.Module]
    """By options, number of classes and channels: what a `hetero_kernels.Distiller` calls."""
    needs_teacher: bool = True
    """Whether there is anything to distil from."""
    projects: bool = False
    """Whether it compares features, by projectors that learn."""
    kd: bool = False
    """Whether it has the KD term on output logits."""
    cwd: bool = False
    """Whether it has channel-wise distillation."""


def _logits(kd: bool) -> Callable[[LossConfig, int, Channels], nn.Module]:
    def build(config: LossConfig, num_classes: int, channels: Channels) -> nn.Module:
        return segmentation_loss(config, task_weight=config.task_weight, kd_weight=config.kd_weight if kd else 0.0)

    return build


def _channel_wise(config: LossConfig, num_classes: int, channels: Channels) -> nn.Module:
    return ChannelWiseLoss(config)


def _heteroakd(*, kmm: bool = True, kem: bool = True) -> Callable[[LossConfig, int, Channels], nn.Module]:
    def build(config: LossConfig, num_classes: int, channels: Channels) -> nn.Module:
        losses = [
            HeteroAKDLoss(
                *pair,
                num_classes,
                projector=config.projector,
                temperature=config.temperature,
                kd_temperature=config.kd_temperature,
                task_weight=config.task_weight,
                kd_weight=config.kd_weight,
                hakd_weight=config.hakd_weight,
                proj_weight=config.proj_weight,
                kmm=config.kmm and kmm,
                kem=config.kem if kem else "none",
                divergence=config.divergence,
                resolution=config.resolution,
                align_corners=config.align_corners,
                logits_align_corners=config.logits_align_corners,
                ignore_index=IGNORE_INDEX,
                class_weight=None if config.class_weight is None else torch.tensor(config.class_weight),
                label_smoothing=config.label_smoothing,
                backend=config.backend,
            )
            for pair in channels
        ]
        return losses[0] if len(losses) == 1 else MeanOverTaps(losses)

    return build


LABELS_ALONE: Final = "none"
"""The method without a teacher, by which teachers are trained."""
METHODS: dict[str, Method] = {
    LABELS_ALONE: Method(_logits(kd=False), needs_teacher=False),
    "kd": Method(_logits(kd=True), kd=True),
    "cwd": Method(_channel_wise, cwd=True),
    "heteroakd": Method(_heteroakd(), projects=True, kd=True),
    "heteroakd_no_kmm": Method(_heteroakd(kmm=False), projects=True, kd=True),
    "heteroakd_no_kem": Method(_heteroakd(kem=False), projects=True, kd=True),
}


def method_named(name: str) -> Method:
    """Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


@dataclass(frozen=True)
class Taps:
    """Which modules' outputs a run uses, by their paths."""

    student: str | Sequence[str]
    teacher: str | Sequence[str] = ()
    auxiliary: str | None = None
    """Of the student, for an auxiliary head."""

    def of_student(self) -> list[str]:
        """All of the student's, each once."""
        return list(dict.fromkeys([*tap_paths(self.student), *([] if self.auxiliary is None else [self.auxiliary])]))


def build_objective(
    name: str,
    config: LossConfig,
    num_classes: int,
    taps: Taps,
    student: Tapped,
    teacher: Tapped | None,
    *,
    auxiliary_weight: float = 0.0,
) -> Objective:
    """A method's criterion for networks that give such logits, and such maps at `taps` (`networks.shapes.probe`).

    Raises ValueError for an unknown method, a missing teacher, class weights that are not K, networks of another number
    of classes, and other numbers of taps in student and teacher.
    """
    method = method_named(name)
    if config.class_weight is not None and len(config.class_weight) != num_classes:
        raise ValueError(f"loss.class_weight must hold {num_classes} values, got {len(config.class_weight)}")
    if method.needs_teacher and teacher is None:
        raise ValueError(f"method {name!r} needs a teacher, got None")
    if not (math.isfinite(auxiliary_weight) and auxiliary_weight >= 0):
        raise ValueError(f"auxiliary_weight must be a finite number from 0 on, got {auxiliary_weight}")
    _check_classes("student" if teacher is not None else "network", student.logits, num_classes)
    if teacher is not None:
        _check_classes("teacher", teacher.logits, num_classes)
    maps = dict(zip(taps.of_student(), student.maps, strict=True))
    auxiliary = None
    if auxiliary_weight:  # before the projectors, so that all methods start with the same one
        if taps.auxiliary is None:
            raise ValueError("auxiliary_weight needs a network with an auxiliary_tap, got None")
        auxiliary = AuxiliaryHead(maps[taps.auxiliary].shape[1], num_classes, auxiliary_weight, config)
    pairs: list[tuple[Tensor, Tensor]] = []
    if method.projects and teacher is not None:
        ours, theirs = tap_paths(taps.student), tap_paths(taps.teacher)
        if len(ours) != len(theirs):
            raise ValueError(
                f"student.tap names {len(ours)} modules ({', '.join(ours)}), teacher.tap {len(theirs)} "
                f"({', '.join(theirs)}): they are paired in their order, so that there must be as many"
            )
        pairs = [(maps[path], features) for path, features in zip(ours, teacher.maps, strict=True)]
    channels = [(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs]
    sizes = [(ours.shape[2], ours.shape[3]) for ours, _ in pairs]
    place = 0 if auxiliary is None else _student_taps(taps, method, auxiliary_weight).index(taps.auxiliary or "")
    return Objective(method.criterion(config, num_classes, channels), sizes, auxiliary, place)


def _student_taps(taps: Taps, method: Method, auxiliary_weight: float) -> list[str]:
    """Those that the objective reads: its pairs', then the auxiliary head's."""
    extra = [taps.auxiliary] if auxiliary_weight and taps.auxiliary is not None else []
    return list(dict.fromkeys([*(tap_paths(taps.student) if method.projects else []), *extra]))


def _check_classes(name: str, logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ValueError(f"the {name} must return logits of {num_classes} classes, got {tuple(logits.shape)}")


def build_distiller(
    student: nn.Module,
    teacher: nn.Module | None,
    name: str,
    config: LossConfig,
    num_classes: int,
    image_size: tuple[int, int],
    taps: Taps,
    *,
    auxiliary_weight: float = 0.0,
) -> Distiller:
    """Student, teacher and the objective of a method; channels come from one image of `image_size` (H, W).

    Raises ValueError as `build_objective` and `networks.shapes.probe`.
    """
    method = method_named(name)
    objective = build_objective(
        name,
        config,
        num_classes,
        taps,
        probe(student, taps.of_student(), image_size),
        None if teacher is None else probe(teacher, tap_paths(taps.teacher), image_size),
        auxiliary_weight=auxiliary_weight,
    )
    return Distiller(
        student,
        teacher,
        objective,
        student_tap=_student_taps(taps, method, auxiliary_weight) or None,
        teacher_tap=tap_paths(taps.teacher) if method.projects else None,
    )


def objective_of(distiller: Distiller) -> Objective:
    """The criterion of a distiller that `build_distiller` made."""
    assert isinstance(distiller.criterion, Objective)
    return distiller.criterion
