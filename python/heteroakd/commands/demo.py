"""`heteroakd demo`: a CNN teacher, a Transformer student by every method, what the loss costs, and a report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from heteroakd.commands.compare import check_ended, environment_of_a_run, write_options
from heteroakd.commands.report import report_sections
from heteroakd.config.commands import DemoRun, DistillRun, TeacherRun
from heteroakd.config.groups import DataConfig, Method, ModelConfig, OptimizerConfig, TeacherConfig
from heteroakd.methods import METHODS
from heteroakd.report.page import Table, write_report
from heteroakd.report.read_runs import Group, read
from heteroakd.report.templates import render
from heteroakd.system.files import LAST, REPORT, write_text

RESULTS = "results.json"
CURVE_POINTS = 60  # lines of metrics per run
EAGER_STEPS = 20


def run_demo(config: DemoRun) -> Path:
    """Train, distil, compare and write `config.output`/report.html; returns its path.

    Every run is a process of its own, so that its peak memory is its own; they run one after the other. Raises
    RunFailedError where one of them fails.
    """
    started, folder = time.monotonic(), Path(config.output)
    print(
        f"Demo on built-in street scenes: a CNN teacher ({config.teacher_steps} steps), then a Transformer student by "
        f"{', '.join(config.methods)} ({config.steps} steps each, same initialisation, same batches).",
        flush=True,
    )
    _run("teacher", teacher_run(config))
    for method in config.methods:
        _run("distill", student_run(config, method))
    groups = [Group(name, [read(folder / name)]) for name in ("teacher", *config.methods)]
    summaries = {group.name: group.runs[0].summary or {} for group in groups}
    tables = [comparison(summaries)]
    for method in [method for method in config.methods if METHODS[method].projects][:1]:
        eager = eager_run(config, method)
        _run("distill", eager)
        tables.append(cost_table(method, summaries[method], read(Path(eager.output)).summary or {}))
    minutes = (time.monotonic() - started) / 60
    maps = any(METHODS[method].projects for method in config.methods)
    notes = render("demo.txt.j2", {}, demo=config, teacher=summaries["teacher"], minutes=minutes, maps=maps)
    title = "HeteroAKD demo: one student, distilled by different methods"
    write_report(folder / REPORT, title=title, introduction=notes, tables=tables, sections=report_sections(groups))
    write_text(folder / RESULTS, json.dumps(summaries, indent=2) + "\n")
    shown = "\n\n".join(map(_as_text, tables))
    print(f"\n{shown}\n\n{notes}\n\nReport: {folder / REPORT}  ({minutes:.1f} minutes in all)", flush=True)
    return folder / REPORT


def teacher_run(config: DemoRun) -> TeacherRun:
    """The demo's teacher: FPN on an EfficientNet-Lite0 encoder."""
    options = {"decoder_segmentation_channels": 64, "decoder_pyramid_channels": 128}
    run = TeacherRun(output=str(Path(config.output) / "teacher"))
    run.model = replace(run.model, weights=config.teacher_weights, options=options)
    run.optimizer = OptimizerConfig(lr=1e-3)
    return _scheduled(run, config, config.teacher_steps)


def student_run(config: DemoRun, method: Method) -> DistillRun:
    """The demo's student by one method: SegFormer on a MiT-B0 encoder with a narrow decoder, from random weights."""
    folder = Path(config.output)
    run = DistillRun(method=method, output=str(folder / method))
    run.teacher = TeacherConfig(checkpoint=str(folder / "teacher" / LAST))
    run.student = ModelConfig(options={"decoder_segmentation_channels": 64})
    run.optimizer = OptimizerConfig(lr=6e-4)
    return _scheduled(run, config, config.steps)


def eager_run(config: DemoRun, method: Method) -> DistillRun:
    """The first steps of a method again, its loss in eager PyTorch."""
    run = student_run(config, method)
    run.loss.backend, run.output, run.runtime.pictures = "reference", f"{run.output}-eager", 0
    run = _scheduled(run, config, min(EAGER_STEPS, config.steps))
    run.data.val_images = 1
    return run


def _scheduled(run: Any, config: DemoRun, steps: int) -> Any:
    run.data = DataConfig(
        crop_size=config.crop_size,
        scale_range=(0.75, 1.5),
        train_images=config.train_images,
        val_images=config.val_images,
        seed=config.seed,
    )
    run.schedule = replace(run.schedule, steps=steps, batch_size=config.batch_size, seed=config.seed)
    run.runtime.threads = config.threads
    run.runtime.log_every = max(1, steps // CURVE_POINTS)
    run.runtime.evaluate_every = max(1, -(-steps // 2))
    run.runtime.save_every = 0
    run.runtime.tensorboard = config.tensorboard
    return run


def _run(command: str, run: TeacherRun | DistillRun) -> None:
    print(f"\n== {command}: {run.output}", flush=True)
    arguments = [sys.executable, "-m", "heteroakd", command, "--config", write_options(run), "--overwrite"]
    check_ended(arguments, subprocess.run(arguments, check=False, env=environment_of_a_run()).returncode)


SHOWN: dict[str, Callable[[dict[str, Any]], object]] = {
    "mIoU": lambda summary: f"{100 * summary['miou']:.1f} %",
    "pixel accuracy": lambda summary: f"{100 * summary['pixel_accuracy']:.1f} %",
    "steps": lambda summary: summary["steps"],
    "s/step": lambda summary: f"{summary['seconds_per_step']:.3f}",
    "images/s": lambda summary: f"{summary['images_per_second']:.1f}",
    "loss backend": lambda summary: summary["loss_backend"],
    "peak memory": lambda summary: f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB",
}
"""Columns of the tables, and what they show of a run's summary."""


def comparison(summaries: dict[str, dict[str, Any]]) -> Table:
    """The demo's table: a row for the teacher and one per method, in the order of the runs."""
    columns = ("mIoU", "pixel accuracy", "steps", "s/step", "images/s", "loss backend")
    rows = []
    for name, summary in summaries.items():
        network = "teacher (FPN, EfficientNet-Lite0)" if name == "teacher" else f"student (SegFormer, MiT-B0), {name}"
        rows.append([network, *(SHOWN[column](summary) for column in columns)])
    note = (
        "s/step: median over the steps, of transfer, networks, loss and optimiser, without loading the data. images/s: "
        "mean, with the time that the loop waits for the data."
    )
    return Table("Comparison", ("network, method", *columns), rows, note)


def cost_table(method: str, fused: dict[str, Any], eager: dict[str, Any]) -> Table:
    """What the same step costs by the backend of the demo's run and in eager PyTorch."""
    columns = ("loss backend", "steps", "s/step", "peak memory")
    rows = []
    for summary in (fused, eager):
        faster = f"{eager['seconds_per_step'] / summary['seconds_per_step']:.2f}"
        rows.append([*(SHOWN[column](summary) for column in columns), faster])
    note = (
        "The whole step, both networks and the optimiser included. Peak memory: the largest resident size of the run's "
        f"own process up to the end of training, Python and libraries included "
        f"({fused['memory_before_training_bytes'] / 2**20:.0f} MiB before the first step)."
    )
    return Table(f"A step of {method} by the loss's backend", (*columns, "times as fast as eager"), rows, note)


def _as_text(table: Table) -> str:
    rows = [[str(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
