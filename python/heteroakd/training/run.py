"""What one training run is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hetero_kernels import Distiller
from heteroakd.config.commands import DistillRun, TeacherRun
from heteroakd.config.groups import ModelConfig, to_dict
from heteroakd.data import SegmentationData
from heteroakd.evaluation.metrics import how_measured


class Run:
    """All that one training run is made of.

    Args:
        options: the whole configuration, which checkpoints hold as `config`.
        distiller: network to train, with its loss and, where the method has one, the frozen teacher.
        data: data set.
        model: the network's options, as it was built.
        loss_backend: name of the backend that computes the losses.
    """

    def __init__(
        self,
        options: TeacherRun | DistillRun,
        distiller: Distiller,
        data: SegmentationData,
        model: ModelConfig,
        loss_backend: str,
    ) -> None:
        self.distiller, self.data, self.loss_backend = distiller, data, loss_backend
        self.kind: Literal["teacher", "student"] = "student" if isinstance(options, DistillRun) else "teacher"
        self.schedule, self.optimizer, self.runtime = options.schedule, options.optimizer, options.runtime
        self.evaluation, self.align_corners = options.evaluation, options.loss.logits_align_corners
        self.measured = how_measured(options.data, options.evaluation)
        self.output, self.config, self.model = Path(options.output), to_dict(options), to_dict(model)


def due(step: int, every: int) -> bool:
    """Whether what happens after every so many steps (0: never) follows this one."""
    return every > 0 and step % every == 0
