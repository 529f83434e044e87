"""What a run, or a comparison of runs, left in its folder, read for a report; and what runs over several seeds say of
methods: mean, spread, paired differences with their standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from heteroakd.system.files import COMPARISON_RESULTS, CONFIG, MAPS, METRICS, PICTURES, SUMMARY, step_files
from heteroakd.training.log import read_metrics

SUMMARIZED = (
    *("steps", "miou", "pixel_accuracy", "seconds_per_step", "images_per_second", "peak_memory_bytes"),
    *("memory_before_training_bytes", "loss_backend", "device", "confusion"),
)
COMPARED = ("methods", "paired_differences")


@dataclass(frozen=True)
class RunFolder:
    """A run that is finished or was cut off."""

    path: Path
    config: dict[str, Any]
    """Its config.yaml."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    summary: dict[str, Any] | None
    """Its summary.json; None where the run has not ended."""

    @property
    def method(self) -> str:
        """Method of a student; "teacher" where there is none."""
        return str(self.config.get("method") or "teacher")

    @property
    def part(self) -> str:
        """Part of the data set that it is evaluated on."""
        return str(self.config["data"].get("evaluation_part", "val"))

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The last line of an evaluation."""
        return next((line for line in reversed(self.metrics) if line["event"] == "evaluation"), None)

    def panels(self) -> dict[tuple[int, int], Path]:
        """Panels of the last step that has some, by step and val image."""
        files = step_files(self.path / PICTURES, ".png")
        last = max((step for step, _ in files), default=0)
        return {(step, image): path for (step, image), path in files.items() if step == last}

    def maps(self) -> dict[int, dict[int, Path]]:
        """Files of maps by val image and step."""
        found: dict[int, dict[int, Path]] = {}
        for (step, image), path in step_files(self.path / MAPS, ".npz").items():
            found.setdefault(image, {})[step] = path
        return found


@dataclass(frozen=True)
class Group:
    """Runs that are shown as one: of one method over seeds, or a run alone."""

    name: str
    runs: list[RunFolder]

    def series(self, event: str, key: str) -> list[tuple[float, float]]:
        """A number of the metrics over the steps, the mean of the runs that have it at a step."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            for line in run.metrics:
                if line["event"] == event and line.get(key) is not None:
                    values.setdefault(line["step"], []).append(line[key])
        return [(step, fmean(found)) for step, found in sorted(values.items())]

    def iou(self) -> dict[str, float | None]:
        """IoU by class after the last evaluation, the mean of the runs that have the class."""
        evaluations = [run.evaluation["iou"] for run in self.runs if run.evaluation is not None]
        names = evaluations[0] if evaluations else {}
        values = {name: [found[name] for found in evaluations if found.get(name) is not None] for name in names}
        return {name: fmean(found) if found else None for name, found in values.items()}

    def confusion(self) -> list[list[int]] | None:
        """The runs' confusion matrices added up; None where no run has one."""
        matrices = [run.summary["confusion"] for run in self.runs if run.summary is not None]
        if not matrices:
            return None
        return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def read_groups(folders: list[str]) -> tuple[list[Group], list[dict[str, Any]]]:
    """The runs in folders of runs and of comparisons, and the comparisons' results.

    Raises ValueError, naming it, for a folder that holds neither, and for files in it that cannot be read.
    """
    groups: list[Group] = []
    comparisons = []
    if not folders:
        raise ValueError("runs must name at least one folder, got none")
    paths = [Path(folder) for folder in folders]
    names = _names(paths)
    for path, folder in zip(paths, names, strict=True):
        if not (path / COMPARISON_RESULTS).is_file():
            groups.append(Group(folder, [read(path)]))
            continue
        comparison = _json(path / COMPARISON_RESULTS, COMPARED)
        comparisons.append(comparison)
        for method, values in comparison["methods"].items():
            runs = [read(path / f"{method}-seed{seed}") for seed in values["runs"]]
            name = method if len(folders) == 1 else f"{folder}, {method}"
            groups += [Group(name, runs)] if runs else []
    return groups, comparisons


def _names(paths: list[Path]) -> list[str]:
    """A name for every folder: its own, or its path where several have the same; the diagrams tell groups apart by
    them. Raises ValueError for a folder that is named twice."""
    resolved = [path.resolve() for path in paths]
    if twice := [path for number, path in enumerate(paths) if resolved[number] in resolved[:number]]:
        raise ValueError(f"runs must name each folder once, got {twice[0]} twice")
    own = [path.name for path in resolved]
    return [name if own.count(name) == 1 else str(path) for name, path in zip(own, paths, strict=True)]


def read(folder: Path) -> RunFolder:
    """One run. Raises ValueError, naming it, where the folder holds none or a file in it cannot be read."""
    if not (folder / METRICS).is_file() or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no run ({CONFIG}, {METRICS}) and no comparison ({COMPARISON_RESULTS}) in it")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / CONFIG}: no YAML: {str(error).splitlines()[0]}") from error
    parts = ("data", "schedule", "evaluation")
    if not (isinstance(config, dict) and all(isinstance(config.get(part), dict) for part in parts)):
        raise ValueError(f"{folder / CONFIG}: no configuration of a run")
    summary = _json(folder / SUMMARY, SUMMARIZED) if (folder / SUMMARY).is_file() else None
    return RunFolder(folder, config, read_metrics(folder / METRICS), summary)


def _json(path: Path, required: Sequence[str]) -> dict[str, Any]:
    try:
        contents = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no JSON object: {error}") from error
    if missing := [name for name in required if name not in contents]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    return contents


STANDARD_ERRORS = 2.0  # a smaller difference is not claimed


class Difference(NamedTuple):
    """A method minus another one over the seeds that both have."""

    mean: float | None
    """Mean difference; None without a common seed."""
    standard_error: float | None
    """Of the mean; None for fewer than two common seeds."""
    seeds: int
    """Number of common seeds."""

    @property
    def verdict(self) -> str:
        """ "better" or "worse" from two standard errors on, else "no claim"."""
        if self.mean is None or self.standard_error is None or self.mean == 0:
            return "no claim"
        if abs(self.mean) < STANDARD_ERRORS * self.standard_error:
            return "no claim"
        return "better" if self.mean > 0 else "worse"


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """Of two methods' results by seed: the same seed means the same student at the start and the same batches."""
    differences = [value - others[seed] for seed, value in values.items() if seed in others]
    if not differences:
        return Difference(None, None, 0)
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(fmean(differences), error, len(differences))


def mean_and_spread(values: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation over the seeds; None where there are too few values."""
    found = list(values.values())
    return (fmean(found) if found else None), (stdev(found) if len(found) > 1 else None)
