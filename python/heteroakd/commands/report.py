"""`heteroakd report`: runs and comparisons as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from heteroakd.commands.compare import percent
from heteroakd.config.commands import ReportRun
from heteroakd.config.groups import DataConfig, EvaluationConfig, from_dict
from heteroakd.evaluation.metrics import how_measured, in_words
from heteroakd.evaluation.pictures import heatmap, sheet_of
from heteroakd.evaluation.visualize import load_maps
from heteroakd.methods import TERMS
from heteroakd.report.figures import Bars, Curve, Matrix
from heteroakd.report.page import Picture, Section, Table, write_report
from heteroakd.report.read_runs import Group, read_groups
from heteroakd.report.templates import render
from heteroakd.system.files import REPORT, check_writable

STEPS_SHOWN = 6  # maps in a row
BRIGHTEST = 0.99  # quantile of the weights that gets the brightest colour: a few pixels are far above the rest
TRUST_EXPLAINED = (
    "Of every pixel's labelled class, on the pictures of each evaluation. KMM's reliability S is the share of the "
    "teacher's knowledge in the target: above 1/2 (bright) the teacher is the better informed, below (dark) the "
    "student is. As the student learns what the teacher knows, S falls. KEM's weight W says how much of a pixel's "
    "distillation is about its labelled class: it grows where that class is still got wrong. The curves are means over "
    "the labelled pixels; the maps of one row share their scale, and gray is not labelled."
)


def run_report(config: ReportRun) -> Path:
    """Write `config.output` (report.html in the first folder, unless it is given); returns the page's path.

    Raises ValueError, naming it, for a folder without a run or with files that cannot be read, and at once where the
    page cannot be written.
    """
    groups, comparisons = read_groups(config.runs)
    path = Path(config.runs[0]) / REPORT if config.output is None else Path(config.output)
    check_writable(path)
    write_report(
        path,
        title=f"HeteroAKD: {', '.join(group.name for group in groups)}",
        introduction=render("introduction.txt.j2", {"measured": _measured}, groups=groups),
        tables=[*(table for comparison in comparisons for table in _comparison(comparison)), _runs(groups)],
        sections=report_sections(groups),
    )
    print(f"written: {path}", flush=True)
    return path


def report_sections(groups: Sequence[Group]) -> list[Section]:
    """Curves, maps, classes and pictures of runs."""
    return [_curves(groups), *trust(groups), *_classes(groups), *_panels(groups)]


def _measured(config: dict[str, Any]) -> str:
    """How the mIoU of a run is measured, in words, by its configuration."""
    data = from_dict(DataConfig, config["data"], "the run's data")
    return in_words(how_measured(data, from_dict(EvaluationConfig, config["evaluation"], "the run's evaluation")))


def _runs(groups: Sequence[Group]) -> Table:
    columns = ("mIoU, %", "pixel accuracy, %", "steps", "s/step", "images/s", "peak memory", "loss backend", "device")
    rows: list[list[object]] = []
    for run in (run for group in groups for run in group.runs):
        if (summary := run.summary) is None:
            last = run.evaluation or {}
            steps = f"{max((line['step'] for line in run.metrics), default=0)} of {run.config['schedule']['steps']}"
            values = [percent(last.get("miou")), percent(last.get("pixel_accuracy")), steps, *[None] * 5]
        else:
            values = [percent(summary["miou"]), percent(summary["pixel_accuracy"])]
            values += [summary[name] for name in ("steps", "seconds_per_step", "images_per_second")]
            values += [f"{summary['peak_memory_bytes'] / 2**20:.1f} MiB", summary["loss_backend"], summary["device"]]
        rows.append([run.path.name, *values])
    note = "After the last step. s/step: median, without loading the data; images/s: mean, with it."
    return Table("Runs", ("run", *columns), rows, note)


def _comparison(results: dict[str, Any]) -> list[Table]:
    methods = [
        [name, len(values["runs"]), percent(values["mean_miou"]), percent(values["standard_deviation"])]
        for name, values in results["methods"].items()
    ]
    pairs = [
        [f"{pair['method']} minus {pair['minus']}", percent(pair["mean"], sign=True), percent(pair["standard_error"]),
         pair["seeds"], pair["verdict"]]
        for pair in results["paired_differences"]
    ]  # fmt: skip
    spread = "Spread: standard deviation over the seeds."
    weak = "Better or worse is said from two standard errors on; with few seeds even that is weak evidence."
    columns = ("methods", "points of mIoU", "standard error", "seeds", "verdict")
    return [
        Table("Methods", ("method", "seeds", "mIoU, %", "spread"), methods, spread),
        Table("Differences, paired by seed", columns, pairs, weak),
    ]


def _curves(groups: Sequence[Group]) -> Section:
    def by_group(event: str, key: str) -> dict[str, list[tuple[float, float]]]:
        series = {group.name: group.series(event, key) for group in groups}
        return {name: points for name, points in series.items() if points}

    parts = " or ".join(sorted({group.runs[0].part for group in groups}))
    curves = [
        Curve("Cross-entropy with the labels, training", "step", "cross-entropy", by_group("train", "task")),
        Curve(f"mIoU on the {parts} part", "step", "mIoU", by_group("evaluation", "miou")),
    ]
    for group in groups:
        terms = {term: group.series("train", term) for term in TERMS}
        used = {term: points for term, points in terms.items() if any(value for _, value in points)}
        if len(used) > 2:  # more than the loss and its cross-entropy
            curves.append(Curve(f"Loss, and its terms before their weights: {group.name}", "step", "value", used))
    return Section("Curves", diagrams=curves)


def trust(groups: Sequence[Group]) -> list[Section]:
    """Curves and maps of KMM and KEM over the evaluations, where a run has some: one section, or none."""
    series = {
        key: {group.name: group.series("knowledge", key) for group in groups} for key in ("reliability", "weight")
    }
    series = {key: {name: points for name, points in found.items() if points} for key, found in series.items()}
    if not series["reliability"]:
        return []
    curves = [
        Curve("Mean reliability S: trust in the teacher", "step", "S", series["reliability"]),
        Curve("Mean KEM weight W of the labelled class", "step", "W", series["weight"]),
    ]
    rows = [
        Picture(f"{group.name}, {group.runs[0].part} image {image}", _map_rows(files))
        for group in groups
        for image, files in group.runs[0].maps().items()
    ]
    return [Section("How trust moves from the teacher to the student", TRUST_EXPLAINED, curves, pictures=rows)]


def _map_rows(files: dict[int, Path]) -> Image.Image:
    """S above, W below, a column per step."""
    steps = sorted(files)
    if len(steps) > STEPS_SHOWN:
        steps = [steps[number * (len(steps) - 1) // (STEPS_SHOWN - 1)] for number in range(STEPS_SHOWN)]
    maps = {step: load_maps(files[step]) for step in steps}
    weights = torch.cat([found.weight.flatten() for found in maps.values()])
    largest = max(1e-12, float(weights.nanquantile(BRIGHTEST).nan_to_num()))
    shown = [(f"S, step {step}", heatmap(found.reliability)) for step, found in maps.items()]
    shown += [
        (f"W to {largest:.2g}, step {step}", heatmap(found.weight, maximum=largest)) for step, found in maps.items()
    ]
    return sheet_of(shown, columns=len(steps))


def _classes(groups: Sequence[Group]) -> list[Section]:
    """Bars and a table of IoU per class for each set of classes, then the confusion matrices."""
    measured = {group.name: group.iou() for group in groups}
    sets: dict[tuple[str, ...], dict[str, dict[str, float | None]]] = {}
    for name, iou in measured.items():
        if iou:
            sets.setdefault(tuple(iou), {})[name] = iou
    sections = []
    for classes, found in sets.items():
        shares = {name: [None if (value := iou[label]) is None else 100 * value for label in classes]
                  for name, iou in found.items()}  # fmt: skip
        bars = Bars("IoU per class", "IoU, %", classes, shares)
        rows = [[label, *(percent(iou[label]) for iou in found.values())] for label in classes]
        note = "A dash: neither labelled nor predicted anywhere."
        sections.append(
            Section("IoU per class", diagrams=[bars], tables=[Table("In numbers, %", ("class", *found), rows, note)])
        )
    counted = {group.name: counts for group in groups if (counts := group.confusion()) is not None}
    if matrices := [Matrix(name, list(measured[name]), counts) for name, counts in counted.items()]:
        text = "Share of each labelled class's pixels, in %, by the class that was predicted: right is the diagonal."
        sections.append(Section("Confusion matrices", text, matrices))
    return sections


def _panels(groups: Sequence[Group]) -> list[Section]:
    pictures = [
        Picture(f"{group.name}, {group.runs[0].part} image {image}, step {step}", path)
        for group in groups
        for (step, image), path in group.runs[0].panels().items()
    ]
    return [Section("Pictures", pictures=pictures)] if pictures else []
