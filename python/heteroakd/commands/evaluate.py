"""`heteroakd evaluate`: IoU per class and mIoU of a checkpoint, and of what its projectors make of both networks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from heteroakd.commands.projections import evaluate_projections, projections_table, run_with_projectors
from heteroakd.config.commands import DistillRun, EvaluateRun
from heteroakd.data import SegmentationData
from heteroakd.evaluation.metrics import Evaluation, Measured, evaluate
from heteroakd.system.distributed import choose_device, on_main, process_group, say
from heteroakd.system.files import check_writable, write_text
from heteroakd.training.trained import choose_evaluation, load_teacher, load_trained, saved_data, saved_loss


def run_evaluate(config: EvaluateRun) -> Evaluation:
    """`heteroakd evaluate`: print IoU per class and mIoU of a checkpoint on a val set."""
    if config.output is not None:
        check_writable(Path(config.output))
    with process_group(choose_device(config.device, config.threads)):
        checkpoint, network, data = load_trained(
            config.checkpoint, config.data, config.root, config.device, config.threads
        )
        run = run_with_projectors(config.checkpoint, checkpoint) if config.projections else None
        found = None if run is None else _teacher_of(run, config.teacher, data, network)
        options = choose_evaluation(config.evaluation, checkpoint)
        measured = Measured.of(saved_data(config.checkpoint, checkpoint, config.root, config.data), options)
        measure = partial(
            evaluate,
            dataset=data.val,
            classes=data.classes,
            options=options,
            limit=config.limit,
            workers=config.workers,
            progress=True,
        )
        evaluation = measure(network, align_corners=saved_loss(checkpoint).logits_align_corners)
        lines = [evaluation.table(), str(measured)]
        numbers = {**_numbers(evaluation), "measured": measured._asdict()}
        if run is not None and found is not None:
            projected = evaluate_projections(run, config.checkpoint, checkpoint, network, *found, measure)
            lines.append(projections_table(evaluation, projected))
            numbers["projections"] = {name: _numbers(each) for name, each in projected.items()}
        if config.output is not None:
            on_main(partial(write_text, Path(config.output), json.dumps(numbers, indent=2) + "\n"))
        say("\n".join(lines), needed=True)
    return evaluation


def _teacher_of(
    run: DistillRun, elsewhere: str | None, data: SegmentationData, student: nn.Module
) -> tuple[nn.Module, list[str]]:
    config = run.teacher if elsewhere is None else replace(run.teacher, checkpoint=elsewhere)
    teacher, taps, source = load_teacher(config, data)
    say(f"teacher: {source}")
    return teacher.to(next(student.parameters()).device).eval(), taps


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.to_dict(), "confusion": evaluation.confusion.tolist()}
