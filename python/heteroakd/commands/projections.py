"""What each network knows in the logit space that HeteroAKD matches them in: its projected features, as predictions.

A teacher whose projection is no better than the student's has nothing to teach there, however good its own output is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from heteroakd.config.commands import DistillRun
from heteroakd.config.groups import from_dict
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.methods.distiller import Teacher, build_distiller
from heteroakd.methods.losses import MeanOverTaps
from heteroakd.networks.taps import TappedNetwork, TappedOutput
from heteroakd.training.checkpoint import Checkpoint, load_state

Measure = Callable[..., Evaluation]
"""`evaluate` on a data set: takes a network and `align_corners`."""


class ProjectedNetwork(nn.Module):
    """A network whose logits are the projection of its feature map at one of its taps.

    Args:
        network: the network.
        projector: maps the feature map [B, C, h, w] to logits [B, K, h, w].
        tap: which of the network's taps.
    """

    def __init__(self, network: TappedNetwork, projector: nn.Module, tap: int) -> None:
        super().__init__()
        self.network = network
        self.projector = projector
        self.tap = tap

    @property
    def stride(self) -> int:
        """Height and width of images must be multiples of this."""
        return self.network.stride

    def forward(self, images: Tensor) -> TappedOutput:
        """Images [B, 3, H, W] -> feature maps at the taps and projected logits."""
        output: TappedOutput = self.network(images)
        return TappedOutput(output.maps, self.projector(output.maps[self.tap]))


def run_with_projectors(path: str, checkpoint: Checkpoint) -> DistillRun:
    """The configuration of a run with projectors. Raises ValueError, naming `path`, for any other."""
    method = checkpoint.config.get("method", "none")
    if not method.startswith("heteroakd"):
        raise ValueError(f"projections: {path} is of the method {method!r}, and only heteroakd's runs have projectors")
    return from_dict(DistillRun, checkpoint.config, path)


def evaluate_projections(
    run: DistillRun, path: str, checkpoint: Checkpoint, student: TappedNetwork, teacher: TappedNetwork, measure: Measure
) -> dict[str, Evaluation]:
    """The teacher's output and both networks' projections at every tap, by name; `path` holds the run's checkpoint.

    Raises CheckpointError where its projectors do not fit the networks.
    """
    num_classes, size = len(checkpoint.classes), run.data.crop_size
    distiller = build_distiller(student, Teacher(teacher), run.method, run.loss, num_classes, size)
    load_state(distiller.loss.load_state_dict, checkpoint.loss, path)
    distiller.eval().to(next(student.parameters()).device)
    loss = distiller.loss
    found = {"teacher": measure(teacher, align_corners=run.loss.logits_align_corners)}
    for tap, pair in enumerate(loss.pairs if isinstance(loss, MeanOverTaps) else [loss]):
        for name, network, projector in (
            ("student", student, pair.student_projector),
            ("teacher", teacher, pair.teacher_projector),
        ):
            projected = ProjectedNetwork(network, cast(nn.Module, projector), tap).eval()
            found[f"{name}, projected from {network.taps[tap]}"] = measure(
                projected, align_corners=run.loss.align_corners
            )
    return found


def projections_table(student: Evaluation, found: dict[str, Evaluation]) -> str:
    """Text for a terminal: a line per network or projection."""
    measured = {"student": student, **found}
    width = max(map(len, measured))
    return "\n".join(f"{name:<{width}}  mIoU {100 * each.miou:6.2f} %" for name, each in measured.items())
