"""`heteroakd evaluate`: IoU per class and mIoU of a checkpoint, and what each network knows in the logit space that
HeteroAKD matches them in: its projected features, as predictions.

A teacher whose projection is no better than the student's has nothing to teach there, however good its own output is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetero_kernels import taps
from heteroakd.config.commands import DistillRun, EvaluateRun
from heteroakd.config.groups import from_dict
from heteroakd.data import SegmentationData
from heteroakd.evaluation.inference import at_label_size
from heteroakd.evaluation.metrics import Evaluation, evaluate_maps, in_words
from heteroakd.methods import LABELS_ALONE, METHODS, Taps, build_distiller, objective_of
from heteroakd.networks.shapes import tap_paths
from heteroakd.system.distributed import choose_device, on_main, process_group, say
from heteroakd.system.files import check_writable, write_text
from heteroakd.training.checkpoint import Checkpoint, load_state
from heteroakd.training.trained import Trained, check_trusted, load_teacher, load_trained


def run_evaluate(config: EvaluateRun) -> Evaluation:
    """`heteroakd evaluate`: print IoU per class and mIoU of a checkpoint on a val set."""
    if config.output is not None:
        check_writable(Path(config.output))
        if Path(config.output).suffix != ".json":
            raise ValueError(f"output must end in .json, got {config.output!r}")
    with process_group(choose_device(config.device, config.threads)):
        trained = load_trained(config, config.device, config.data, config.evaluation)
        data, measured = trained.build_data(), trained.measured
        measure = partial(
            evaluate_maps,
            dataset=data.val,
            classes=data.classes,
            options=trained.evaluation,
            limit=config.limit,
            workers=config.workers,
            align_corners=trained.align_corners,
            progress=True,
        )
        projected: dict[str, Evaluation] = {}
        if config.projections:
            run = run_with_projectors(config.checkpoint, trained.checkpoint)
            teacher = _teacher_of(run, config, data, trained.network)
            evaluation, projected = measure_projections(run, trained, *teacher, measure)
        else:
            (evaluation,) = measure(trained.network, 1)
        lines = [evaluation.table(), in_words(measured)]
        numbers = {**_numbers(evaluation), "measured": measured}
        if projected:
            shown = {"student": evaluation, **projected}
            width = max(map(len, shown))
            lines += [f"{name:<{width}}  mIoU {100 * each.miou:6.2f} %" for name, each in shown.items()]
            numbers["projections"] = {name: _numbers(each) for name, each in projected.items()}
        if config.output is not None:
            on_main(partial(write_text, Path(config.output), json.dumps(numbers, indent=2) + "\n"))
        say("\n".join(lines), needed=True)
    return evaluation


def _teacher_of(
    run: DistillRun, config: EvaluateRun, data: SegmentationData, student: nn.Module
) -> tuple[nn.Module, list[str]]:
    there = run.teacher
    if config.teacher is not None:
        there = replace(there, checkpoint=config.teacher, model=None)
    elif there.model is not None:
        check_trusted(config.checkpoint, there.model, config.trust_architecture)
    teacher, taps, source = load_teacher(there, data, config.trust_architecture)
    say(f"teacher: {source}")
    return teacher.to(next(student.parameters()).device).eval(), taps


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.to_dict(), "confusion": evaluation.confusion.tolist()}


class ProjectedNetwork(nn.Module):
    """A network that gives, of one run, its own logits and the projections of its feature maps.

    Args:
        network: the network.
        projectors: each maps a feature map [1, C, h, w] to logits [1, K, h, w].
        paths: of the modules that give the feature maps.
        align_corners: of the interpolation of its own logits, and of that of the projected ones.
    """

    def __init__(
        self,
        network: nn.Module,
        projectors: Sequence[nn.Module],
        paths: Sequence[str],
        align_corners: tuple[bool, bool],
    ) -> None:
        super().__init__()
        self.network = network
        self.projectors = nn.ModuleList(projectors)
        self.taps = taps.tap(network, paths)
        self.align_corners = align_corners
        self.encoder = getattr(network, "encoder", None)  # has the stride

    def forward(self, images: Tensor) -> Tensor:
        """One image [1, 3, H, W] -> logits [1 + number of projectors, K, H, W]."""
        found = taps.run(self.network, self.taps, images)
        own, projected = self.align_corners
        maps = [(found.logits, own)]
        maps += [(project(each), projected) for project, each in zip(self.projectors, found.maps, strict=True)]
        size = (images.shape[2], images.shape[3])
        return torch.cat([at_label_size(logits, size, images, corners) for logits, corners in maps])


def run_with_projectors(path: str, checkpoint: Checkpoint) -> DistillRun:
    """The configuration of a run with projectors. Raises ValueError, naming `path`, for any other."""
    method = checkpoint.config.get("method", LABELS_ALONE)
    if method not in METHODS or not METHODS[method].projects:
        raise ValueError(f"projections: {path} is of the method {method!r}, and only heteroakd's runs have projectors")
    return from_dict(DistillRun, checkpoint.config, path)


def measure_projections(
    run: DistillRun,
    trained: Trained,
    teacher: nn.Module,
    teacher_tap: list[str],
    measure: Callable[[nn.Module, int], list[Evaluation]],
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """The student's output; and the teacher's, and both networks' projections at every tap, by name. Each network runs
    once for an image. `measure` is `evaluate_maps` on a data set.

    Raises CheckpointError where its projectors do not fit the networks.
    """
    student, checkpoint, student_tap = trained.network, trained.checkpoint, tap_paths(run.student.tap)
    num_classes = len(checkpoint.classes)
    paths = Taps(student_tap, teacher_tap)
    distiller = build_distiller(student, teacher, run.method, run.loss, num_classes, run.data.crop_size, paths)
    objective = objective_of(distiller)
    load_state(objective.criterion.load_state_dict, checkpoint.loss, trained.path)
    distiller.eval().to(next(student.parameters()).device)
    corners = (run.loss.logits_align_corners, run.loss.align_corners)
    ours = ProjectedNetwork(student, [pair.student_projector for pair in objective.pairs], student_tap, corners)
    theirs = ProjectedNetwork(teacher, [pair.teacher_projector for pair in objective.pairs], teacher_tap, corners)
    count = 1 + len(student_tap)
    (evaluation, *students), (own, *teachers) = measure(ours, count), measure(theirs, count)
    found = {"teacher": own}
    for number, (tap, other) in enumerate(zip(student_tap, teacher_tap, strict=True)):
        found[f"student, projected from {tap}"] = students[number]
        found[f"teacher, projected from {other}"] = teachers[number]
    return evaluation, found
