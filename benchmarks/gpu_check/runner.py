"""Runs the stages, each a process of its own with a time limit, and writes the report after every wave.

Whatever a stage does, each of its cases has a record afterwards.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import device as devices
from . import plan, records, report
from .case import load
from .plan import Stage
from .pool import ended
from .records import DID_NOT_RUN, FAILED, PASSED, Record

ROOT = Path(__file__).parents[2]
GRACE = 3.0  # seconds that a stage has to write down what it could not do
# Variables that change what runs.
CHANGING = ("HETERO_KERNELS_BACKEND", "HETERO_KERNELS_AUTOTUNE", "HETERO_KERNELS_CHECK_LABELS", "TRITON_INTERPRET")
NO_GPU = "torch sees no GPU"


@dataclass
class Running:
    stage: Stage
    process: subprocess.Popen
    names: list[str]
    since: float


class Runner:
    """One check. ``folder``: where everything is saved; ``only``: names of the cases that are wanted, None for all;
    ``waves``: of stages; ``rehearse``: without a GPU, on the CPU where that is possible."""

    def __init__(
        self, folder: Path, deadline: float, rehearse: bool, only: set[str] | None = None,
        waves: Sequence[Sequence[Stage]] = plan.WAVES,
    ) -> None:  # fmt: skip
        self.folder, self.deadline, self.rehearse, self.only = folder.resolve(), deadline, rehearse, only
        self.results = self.folder / records.RESULTS
        self.begin = time.monotonic()
        self._keep(Record("run", "run", PASSED, time.strftime("%Y-%m-%d %H:%M"), data={"rehearsal": rehearse}))
        self.gpu = devices.has_gpu()
        self.names = {stage: self._names(stage) for wave in waves for stage in wave}
        kept = [[stage for stage in wave if self.names[stage]] for wave in waves]
        self.waves = [wave for wave in kept if wave]

    def _names(self, stage: Stage) -> list[str]:
        try:
            names = [case.name for case in load(stage.source)]
        except Exception as problem:  # its cases cannot even be listed
            self._keep(Record(f"{stage.name}/cases", stage.name, FAILED, f"{type(problem).__name__}: {problem}"))
            return []
        listing = f"{stage.name}/cases"
        if self.only is None or listing not in self.only:
            return [name for name in names if self.only is None or name in self.only]
        self._keep(Record(listing, stage.name, PASSED))  # what could not be listed before is wanted whole
        return names

    def _keep(self, record: Record) -> None:
        records.append(self.results, record)

    def run(self) -> int:
        """Exit status: 0 where every case passed (or, rehearsing, none failed)."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        try:
            with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
                with open(self.folder / "stages.log", "a") as log:
                    for position, wave in enumerate(self.waves):
                        spent = time.monotonic() - self.begin
                        limit = plan.limit(position, self.waves, self.deadline, spent)
                        self._run_wave(wave, limit, self._environment(scratch), log)
                        self.report()
        finally:
            status = self.report()
        return status

    def _environment(self, scratch: str) -> dict[str, str]:
        """Of every stage: this very source tree, and caches that no earlier version filled."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        cache = ROOT / "build" / "gpu_check" / "triton"
        return {
            **{k: v for k, v in os.environ.items() if k not in CHANGING},
            "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": scratch, "OMP_NUM_THREADS": "1", "GPU_CHECK_FOLDER": str(self.folder),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's deterministic mode asks for it
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }  # fmt: skip

    def _run_wave(self, wave: Sequence[Stage], limit: float, environment: dict[str, str], log: IO[str]) -> None:
        if not self.gpu and not self.rehearse:
            for stage in wave:
                self._fill(stage, self.names[stage], DID_NOT_RUN, NO_GPU)
            return
        print(f"{time.strftime('%H:%M:%S')} {', '.join(s.name for s in wave)}: {limit:.0f} s", flush=True)
        end, running = time.monotonic() + limit, []
        try:
            for stage in wave:
                running.append(self._start(stage, limit - GRACE, environment, log))
            for one in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(0.0, end - time.monotonic()))
        finally:
            for one in running:
                self._end(one)

    def _start(self, stage: Stage, seconds: float, environment: dict[str, str], log: IO[str]) -> Running:
        if stage.interpreted and not self.gpu:
            environment = {**environment, "TRITON_INTERPRET": "1"}
        workers = stage.workers if self.gpu else min(stage.workers, os.cpu_count() or 1)
        given = (stage.name, stage.source, workers, "cuda" if self.gpu else "cpu", self.folder, max(0.0, seconds),
                 stage.niceness)  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.gpu_check.stage", *map(str, given)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        names = self.names[stage]
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its status says so
            assert process.stdin is not None
            process.stdin.write(json.dumps(names))
            process.stdin.close()
        return Running(stage, process, names, time.monotonic())

    def _end(self, one: Running) -> None:
        """Ends what is left of a stage, itself and all it started, and says what became of its cases."""
        status = one.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        seconds = time.monotonic() - one.since
        name = f"stage/{one.stage.name}"
        if status == 0:
            self._keep(Record(name, one.stage.name, PASSED, "", seconds))
            return
        what = f"killed at its limit after {seconds:.0f} s" if status is None else f"ended early: {ended(status)}"
        self._keep(Record(name, one.stage.name, FAILED, f"{what} (stages.log)", seconds))
        done = {r.name for r in self._since()}
        self._fill(one.stage, [n for n in one.names if n not in done], DID_NOT_RUN, f"its stage was {what}")

    def _since(self) -> Iterator[Record]:
        """Records of this very run."""
        every = list(records.read(self.results))
        begins = [i for i, record in enumerate(every) if record.name == "run"]
        return iter(every[begins[-1] if begins else 0 :])

    def _fill(self, stage: Stage, names: Sequence[str], status: str, reason: str) -> None:
        for name in names:
            self._keep(Record(name, stage.name, status, reason))

    def report(self) -> int:
        """Writes report.md; the exit status."""
        found = records.latest(records.read(self.results))
        report.write(found, self.folder / "report.md")
        bad = [r for r in found.values() if r.status == FAILED or (r.status == DID_NOT_RUN and not self.rehearse)]
        return int(bool(bad))


def choose(only: str | None, earlier: dict[str, Record]) -> set[str] | None:
    """Names of the cases that ``--only`` asks for: "FAILED" (and what did not run) of an earlier run, or a pattern."""
    if only is None:
        return None
    if only == "FAILED":
        names = {name for name, record in earlier.items() if record.status != PASSED}
        for stage in {earlier[name].stage for name in names if name.startswith("stage/")}:
            of_stage = {name for name, r in earlier.items() if r.stage == stage and not name.startswith("stage/")}
            names |= of_stage if not names & of_stage else set()  # nothing failed but the stage itself
        return names
    return {case.name for wave in plan.WAVES for stage in wave for case in load(stage.source)
            if fnmatch.fnmatch(case.name, only)}  # fmt: skip
