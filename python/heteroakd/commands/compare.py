"""`heteroakd compare`: methods x seeds on one schedule, continued where it stopped, and a table of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import hetero_kernels
import heteroakd
from heteroakd.config.commands import CompareRun, DistillRun, TeacherRun, fill_names
from heteroakd.config.groups import Method, to_dict
from heteroakd.data import build_data
from heteroakd.methods import METHODS
from heteroakd.report.read_runs import mean_and_spread, paired_difference
from heteroakd.report.templates import render
from heteroakd.system.distributed import say
from heteroakd.system.files import COMPARISON, COMPARISON_RESULTS, LAST, SUMMARY, write_text
from heteroakd.system.signals import StoppedError, StopRequest
from heteroakd.training.checkpoint import CheckpointError, check_same_run, load_checkpoint, load_latest, state_digest
from heteroakd.training.step import check_parts
from heteroakd.training.trained import files_digest, may_differ

Results = dict[Method, dict[int, dict[str, Any]]]
"""Summaries by method and seed."""


class RunFailedError(OSError):
    """A run ended with an error, which it printed itself."""


def run_compare(config: CompareRun) -> Path:
    """Run what is missing, write the tables after every run; returns the path of the Markdown table.

    Raises RunFailedError where a run fails, StoppedError at SIGINT, SIGTERM and SIGHUP (after the step that runs, with
    its checkpoint), CheckpointError where the folder holds runs of other options or of another teacher, ValueError for
    wrong options.
    """
    check_parts(config.schedule, config.processes)
    if config.method is not None:
        say(f"method {config.method} is not used: compared are the methods {', '.join(config.methods)}")
    config = fill_names(config, "compare")
    folder = Path(config.output)
    runs = [distill_run(config, method, seed) for seed in config.seeds for method in config.methods]
    results: Results = {method: {} for method in config.methods}
    for run in runs:
        if summary := finished(run):
            results[run.method][run.schedule.seed] = summary
    missing = [run for run in runs if run.schedule.seed not in results[run.method]]
    say(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before")
    needs_teacher = any(METHODS[run.method].needs_teacher for run in missing)
    for run in missing:
        if needs_teacher:
            theirs = config.teacher.model is not None  # another codebase's has no checkpoint of ours
            digest = "" if theirs else state_digest(load_checkpoint(config.teacher.checkpoint).network)
            check_one_teacher(folder, results, digest)
        say(f"\n== {run.output}")
        _train(run, config.processes)
        summary = finished(run)
        if summary is None:
            raise RunFailedError(f"{run.output}: ended without {SUMMARY} of its last step")
        results[run.method][run.schedule.seed] = summary
        _write(folder, config, results)
    check_one_teacher(folder, results)
    _write(folder, config, results)
    say(f"\n{markdown(config, results)}\nwritten: {folder / COMPARISON}, {folder / COMPARISON_RESULTS}")
    say(f"as a page, with curves and pictures: heteroakd report --runs {folder}")
    return folder / COMPARISON


def write_options(run: TeacherRun | DistillRun) -> str:
    """The path of a configuration file, beside its output, for a run that is a process of its own."""
    path = Path(f"{run.output}.yaml")
    write_text(path, yaml.safe_dump(to_dict(run), sort_keys=False))
    return str(path)


def environment_of_a_run() -> dict[str, str]:
    """What a process of its own starts with: from Python 3.11 on it imports what this one does, not what else lies in
    the current folder."""
    own = {Path(str(module.__file__)).resolve().parents[1] for module in (heteroakd, hetero_kernels)}
    return {**os.environ} if Path.cwd() in own else {**os.environ, "PYTHONSAFEPATH": "1"}


def check_ended(command: list[str], status: int) -> None:
    """Raises RunFailedError for a process of a run that ended with an error."""
    if status:
        raise RunFailedError(f"`{' '.join(command[1:])}` ended with status {status}; its message is above")


def distill_run(config: CompareRun, method: Method, seed: int) -> DistillRun:
    """The run of one method and seed."""
    shared = {entry.name: getattr(config, entry.name) for entry in fields(DistillRun) if hasattr(config, entry.name)}
    shared["schedule"] = replace(config.schedule, seed=seed)
    return DistillRun(**{**shared, "method": method, "output": str(Path(config.output) / f"{method}-seed{seed}")})


def finished(run: DistillRun) -> dict[str, Any] | None:
    """The summary of a run that is complete, None where it is still to run. Raises CheckpointError for another's."""
    last = Path(run.output) / LAST
    try:
        path, checkpoint = load_latest(last, lambda error: None)
    except CheckpointError:
        return None  # not there, or damaged: the run itself says what it does about that
    moved = checkpoint.config["data"]["root"] != run.data.root
    files = files_digest(build_data(run.data), run.data.root) if moved else ""
    check_same_run(path, checkpoint.config, to_dict(run), may_differ=may_differ(checkpoint, files))
    summary_file = Path(run.output) / SUMMARY
    if checkpoint.step < run.schedule.steps or not summary_file.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(summary_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{summary_file}: no JSON: {error}; without it, the run writes another") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("miou", ""), float | None):
        raise CheckpointError(f"{summary_file}: no summary of a run; without it, the run writes another")
    return summary


def check_one_teacher(folder: Path, results: Results, digest: str = "") -> None:
    """Raises CheckpointError, naming them, where finished runs have another teacher than that of the digest or, without
    one, than the first of them."""
    known = {
        f"{method}-seed{seed}": summary["teacher"]
        for method, summaries in results.items()
        for seed, summary in summaries.items()
        if summary.get("teacher")
    }
    expected = digest or next(iter(known.values()), "")
    others = [name for name, theirs in known.items() if theirs != expected]
    if others:
        than = "the one that is there now" if digest else next(iter(known))
        raise CheckpointError(
            f"{folder}: another teacher than {than} has {', '.join(others)}: it was trained again since, and "
            "differences would mean nothing. Put the old one back, or delete these folders and have them run again"
        )


def _train(run: DistillRun, processes: int) -> None:
    """A process of its own, or torchrun's, so that its peak memory is its own; signals are passed on to it."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["heteroakd", "distill", "--config", write_options(run), "--resume_or_start"]
    with StopRequest() as stop:
        # In a session of its own: a terminal's Ctrl-C reaches it once, from here.
        process = subprocess.Popen(command, start_new_session=True, env=environment_of_a_run())
        told = False
        try:
            while process.poll() is None:
                if stop.signal_number is not None and not told:
                    process.terminate()
                    told = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
        finally:
            if process.poll() is None:  # a second Ctrl-C
                (process.kill if processes == 1 else process.terminate)()  # torchrun alone can end its processes
                process.wait()
        if stop.signal_number is not None:
            raise StoppedError(f"stopped in {run.output}; the same command continues there", stop.signal_number)
    check_ended(command, process.returncode)


def _write(folder: Path, config: CompareRun, results: Results) -> None:
    write_text(folder / COMPARISON, markdown(config, results))
    write_text(folder / COMPARISON_RESULTS, json.dumps(as_dict(config, results), indent=2) + "\n")


def as_dict(config: CompareRun, results: Results) -> dict[str, Any]:
    """Everything that was measured, JSON-compatible: runs, means, spreads, differences of all pairs of methods. A run
    without any labelled pixel has no mIoU."""
    measured = {
        method: {seed: summary["miou"] for seed, summary in runs.items() if summary["miou"] is not None}
        for method, runs in results.items()
    }
    pairs = []
    for number, method in enumerate(config.methods):
        for other in config.methods[:number]:
            difference = paired_difference(measured[method], measured[other])
            pairs.append({"method": method, "minus": other, **difference._asdict(), "verdict": difference.verdict})
    methods = {}
    for method in config.methods:
        mean, spread = mean_and_spread(measured[method])
        methods[method] = {"mean_miou": mean, "standard_deviation": spread, "runs": results[method]}
    return {"config": to_dict(config), "methods": methods, "paired_differences": pairs}


def markdown(config: CompareRun, results: Results) -> str:
    """The table: a row per method, with its differences from every method before it."""
    found = as_dict(config, results)
    differences = {(pair["method"], pair["minus"]): pair for pair in found["paired_differences"]}
    filters, before = {"percent": percent}, config.methods[:-1]
    return render("comparison.md.j2", filters, **found, before=before, differences=differences) + "\n"


def percent(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.2f}"
