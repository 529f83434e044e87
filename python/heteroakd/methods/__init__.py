"""The training methods, an object each; nobody else knows what a method's name means."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from hetero_kernels import Distiller, HeteroAKDLoss, MeanOverTaps
from heteroakd.config.groups import LossConfig
from heteroakd.data import IGNORE_INDEX
from heteroakd.methods.losses import TERMS as TERMS
from heteroakd.methods.losses import AuxiliaryHead, ChannelWiseLoss, segmentation_loss
from heteroakd.methods.losses import Objective as Objective
from heteroakd.methods.losses import Terms as Terms
from heteroakd.networks.shapes import probe, tap_paths

HETEROAKD_OPTIONS = frozenset(inspect.signature(HeteroAKDLoss).parameters)


@dataclass(frozen=True)
class Method:
    """A way to train a student: by the cross-entropy with the labels, and what it adds to that."""

    kd: bool = False
    """The KD term on output logits."""
    cwd: bool = False
    """Channel-wise distillation of output logits."""
    projects: bool = False
    """The HeteroAKD terms, which compare features by projectors that learn."""
    kmm: bool = True
    """Of these, with the options' knowledge mixing; else the target is the teacher's knowledge alone."""
    kem: bool = True
    """And with the options' weights; else without weights."""

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anything to distil from."""
        return self.kd or self.cwd or self.projects

    def criterion(self, config: LossConfig, num_classes: int, channels: Sequence[tuple[int, int]]) -> nn.Module:
        """What a `hetero_kernels.Distiller` calls; `channels` of student and teacher at every pair of taps."""
        if self.cwd:
            return ChannelWiseLoss(config)
        if not self.projects:
            kd_weight = config.kd_weight if self.kd else 0.0
            return segmentation_loss(config, task_weight=config.task_weight, kd_weight=kd_weight)
        options = {name: value for name, value in vars(config).items() if name in HETEROAKD_OPTIONS}
        options |= {"kmm": config.kmm and self.kmm, "kem": config.kem if self.kem else "none"}
        if config.class_weight is not None:
            options["class_weight"] = torch.tensor(config.class_weight)
        losses = [HeteroAKDLoss(*pair, num_classes, ignore_index=IGNORE_INDEX, **options) for pair in channels]
        return losses[0] if len(losses) == 1 else MeanOverTaps(losses)


LABELS_ALONE: Final = "none"
"""The method without a teacher, by which teachers are trained."""
METHODS = {
    LABELS_ALONE: Method(),
    "kd": Method(kd=True),
    "cwd": Method(cwd=True),
    "heteroakd": Method(projects=True, kd=True),
    "heteroakd_no_kmm": Method(projects=True, kd=True, kmm=False),
    "heteroakd_no_kem": Method(projects=True, kd=True, kem=False),
}


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

    Raises ValueError for a missing teacher, class weights that are not K, networks of another number of classes, other
    numbers of taps in student and teacher, and as `networks.shapes.probe`.
    """
    method = METHODS[name]
    if config.class_weight is not None and len(config.class_weight) != num_classes:
        raise ValueError(f"loss.class_weight must hold {num_classes} values, got {len(config.class_weight)}")
    if method.needs_teacher and teacher is None:
        raise ValueError(f"method {name!r} needs a teacher, got None")
    ours, theirs = (tap_paths(paths) if method.projects else [] for paths in (taps.student, taps.teacher))
    if len(ours) != len(theirs):
        raise ValueError(
            f"student.tap names {len(ours)} modules ({', '.join(ours)}), teacher.tap {len(theirs)} "
            f"({', '.join(theirs)}): they are paired in their order, so that there must be as many"
        )
    found = probe(student, taps.of_student(), image_size)
    _check_classes("student" if teacher is not None else "network", found.logits, num_classes)
    pairs: list[tuple[Tensor, Tensor]] = []
    maps = dict(zip(taps.of_student(), found.maps, strict=True))
    if teacher is not None:
        other = probe(teacher, tap_paths(taps.teacher), image_size)
        _check_classes("teacher", other.logits, num_classes)
        pairs = [(maps[path], features) for path, features in zip(ours, other.maps, strict=False)]
    auxiliary, read, place = None, ours, -1
    if auxiliary_weight and taps.auxiliary is not None:
        # Before the projectors, so that all methods start with the same one.
        auxiliary = AuxiliaryHead(maps[taps.auxiliary].shape[1], num_classes, auxiliary_weight, config)
        read = list(dict.fromkeys([*ours, taps.auxiliary]))
        place = read.index(taps.auxiliary)
    criterion = method.criterion(config, num_classes, [(mine.shape[1], its.shape[1]) for mine, its in pairs])
    sizes = [(mine.shape[2], mine.shape[3]) for mine, _ in pairs]
    objective = Objective(criterion, sizes, auxiliary, place)
    return Distiller(student, teacher, objective, student_tap=read or None, teacher_tap=theirs or None)


def _check_classes(name: str, logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ValueError(f"the {name} must return logits of {num_classes} classes, got {tuple(logits.shape)}")


def objective_of(distiller: Distiller) -> Objective:
    """The criterion of a distiller that `build_distiller` made."""
    assert isinstance(distiller.criterion, Objective)
    return distiller.criterion
