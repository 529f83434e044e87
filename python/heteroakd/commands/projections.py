"""What each network knows in the logit space that HeteroAKD matches them in: its projected features, as predictions.

A teacher whose projection is no better than the student's has nothing to teach there, however good its own output is.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hetero_kernels import taps
from heteroakd.config.commands import DistillRun
from heteroakd.config.groups import from_dict
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.methods import LABELS_ALONE, Taps, build_distiller, method_named, objective_of
from heteroakd.networks.shapes import tap_paths
from heteroakd.training.checkpoint import Checkpoint, load_state

Measure = Callable[..., Evaluation]
"""`evaluate` on a data set: takes a network and `align_corners`."""


class ProjectedNetwork(nn.Module):
    """A network whose logits are the projection of its feature map at one of its taps.

    Args:
        network: the network.
        projector: maps the feature map [B, C, h, w] to logits [B, K, h, w].
        tap: path of the module that gives it.
    """

    def __init__(self, network: nn.Module, projector: nn.Module, tap: str) -> None:
        super().__init__()
        self.network = network
        self.projector = projector
        self.taps = taps.tap(network, [tap])
        self.encoder = getattr(network, "encoder", None)  # has the stride

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> projected logits."""
        logits: Tensor = self.projector(taps.run(self.network, self.taps, images).maps[0])
        return logits


def run_with_projectors(path: str, checkpoint: Checkpoint) -> DistillRun:
    """The configuration of a run with projectors. Raises ValueError, naming `path`, for any other."""
    method = checkpoint.config.get("method", LABELS_ALONE)
    if not method_named(method).projects:
        raise ValueError(f"projections: {path} is of the method {method!r}, and only heteroakd's runs have projectors")
    return from_dict(DistillRun, checkpoint.config, path)


def evaluate_projections(
    run: DistillRun,
    path: str,
    checkpoint: Checkpoint,
    student: nn.Module,
    teacher: nn.Module,
    teacher_tap: list[str],
    measure: Measure,
) -> dict[str, Evaluation]:
    """The teacher's output and both networks' projections at every tap, by name; `path` holds the run's checkpoint.

    Raises CheckpointError where its projectors do not fit the networks.
    """
    num_classes, size, paths = len(checkpoint.classes), run.data.crop_size, Taps(run.student.tap, teacher_tap)
    distiller = build_distiller(student, teacher, run.method, run.loss, num_classes, size, paths)
    objective = objective_of(distiller)
    load_state(objective.criterion.load_state_dict, checkpoint.loss, path)
    distiller.eval().to(next(student.parameters()).device)
    found = {"teacher": measure(teacher, align_corners=run.loss.logits_align_corners)}
    for pair, ours, theirs in zip(objective.pairs, tap_paths(run.student.tap), teacher_tap, strict=True):
        for name, network, projector, tap in (
            ("student", student, pair.student_projector, ours),
            ("teacher", teacher, pair.teacher_projector, theirs),
        ):
            projected = ProjectedNetwork(network, projector, tap).eval()
            found[f"{name}, projected from {tap}"] = measure(projected, align_corners=run.loss.align_corners)
    return found


def projections_table(student: Evaluation, found: dict[str, Evaluation]) -> str:
    """Text for a terminal: a line per network or projection."""
    measured = {"student": student, **found}
    width = max(map(len, measured))
    return "\n".join(f"{name:<{width}}  mIoU {100 * each.miou:6.2f} %" for name, each in measured.items())
