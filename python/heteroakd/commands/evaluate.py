"""`heteroakd evaluate`: IoU per class and mIoU of a checkpoint, and of what its projectors make of both networks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from heteroakd.commands.projections import measure_projections, projections_table, run_with_projectors
from heteroakd.config.commands import DistillRun, EvaluateRun
from heteroakd.data import SegmentationData
from heteroakd.evaluation.metrics import Evaluation, Measured, evaluate_maps
from heteroakd.system.distributed import choose_device, on_main, process_group, say
from heteroakd.system.files import check_writable, write_text
from heteroakd.training.trained import (
    check_trusted,
    choose_evaluation,
    load_teacher,
    load_trained,
    saved_data,
    saved_loss,
)


def run_evaluate(config: EvaluateRun) -> Evaluation:
    """`heteroakd evaluate`: print IoU per class and mIoU of a checkpoint on a val set."""
    if config.output is not None:
        check_writable(Path(config.output))
    with process_group(choose_device(config.device, config.threads)):
        checkpoint, network, data = load_trained(config, config.device, config.data)
        options = choose_evaluation(config.evaluation, checkpoint)
        measured = Measured.of(saved_data(config.checkpoint, checkpoint, config.root, config.data), options)
        measure = partial(
            evaluate_maps,
            dataset=data.val,
            classes=data.classes,
            options=options,
            limit=config.limit,
            workers=config.workers,
            align_corners=saved_loss(checkpoint).logits_align_corners,
            progress=True,
        )
        projected: dict[str, Evaluation] = {}
        if config.projections:
            run = run_with_projectors(config.checkpoint, checkpoint)
            teacher = _teacher_of(run, config, data, network)
            evaluation, projected = measure_projections(run, config.checkpoint, checkpoint, network, *teacher, measure)
        else:
            (evaluation,) = measure(network, 1)
        lines = [evaluation.table(), str(measured)]
        numbers = {**_numbers(evaluation), "measured": measured._asdict()}
        if projected:
            lines.append(projections_table(evaluation, projected))
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
