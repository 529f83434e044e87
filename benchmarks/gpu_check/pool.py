"""Runs cases in worker processes, so that one that crashes or hangs takes nothing with it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .case import Case
from .records import DID_NOT_RUN, FAILED, Record

WORKER = ("-m", "benchmarks.gpu_check.worker")
START_LIMIT = 90.0  # seconds for a worker's imports
BROKEN_STARTS = 3  # workers that may end before they are ready


def ended(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


class _Worker:
    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self.case: Case | None = None
        self.device = ""
        self.since = time.monotonic()
        self._unread = b""

    @property
    def ready(self) -> bool:
        return bool(self.device)

    def limit(self) -> float:
        return START_LIMIT if not self.ready else self.case.limit if self.case else float("inf")

    def give(self, case: Case) -> None:
        self.case, self.since = case, time.monotonic()
        self.input.write((json.dumps(case.name) + "\n").encode())

    def answers(self) -> list[dict[str, Any]] | None:
        """What it said since; None where it has ended."""
        received = os.read(self.output.fileno(), 1 << 20)
        if not received:
            return None
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]

    def end(self, patience: float = 0.0) -> int:
        """Its exit status; it is killed where it goes on after ``patience`` seconds."""
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.input.close()
        self.output.close()
        return status


def run(
    cases: Sequence[Case], source: str, device: str, workers: int, until: float, keep: Callable[[Record], None],
    stage: str, worker: Sequence[str] = WORKER,
) -> None:  # fmt: skip
    """Runs ``cases`` of ``source`` and gives ``keep`` each one's record as it ends.

    Every case gets one: of those that are running at ``until`` (``time.monotonic()``) and of those that were not begun
    by then, that they did not run.
    """
    command = [sys.executable, *worker, source, device]
    waiting, broken = deque(cases), 0
    living: dict[Any, _Worker] = {}  # by the file that answers come from
    selector = selectors.DefaultSelector()

    def start() -> None:
        new = _Worker(command)
        living[new.output] = new
        selector.register(new.output, selectors.EVENT_READ)

    def drop(one: _Worker, patience: float = 0.0) -> int:
        selector.unregister(one.output)
        del living[one.output]
        return one.end(patience)

    def lose(one: _Worker, status: str, detail: str) -> None:
        if one.case is not None:
            keep(Record(one.case.name, stage, status, detail, time.monotonic() - one.since, one.device))
            one.case = None

    def hand_out(one: _Worker) -> None:
        if not waiting:
            drop(one)
            return
        try:
            one.give(waiting.popleft())
        except BrokenPipeError:  # it has ended: its answers say so
            pass

    try:
        while (waiting or living) and broken < BROKEN_STARTS:
            while len(living) < min(workers, len(waiting) + sum(w.case is not None for w in living.values())):
                start()
            left = until - time.monotonic()
            nearest = min((w.since + w.limit() - time.monotonic() for w in living.values()), default=left)
            if left <= 0:
                break
            for key, _ in selector.select(max(0.01, min(left, nearest))):
                one = living[key.fileobj]
                answers = one.answers()
                if answers is None:
                    broken += not one.ready
                    lose(one, FAILED, f"its process ended during it: {ended(drop(one, 2.0))}")
                    continue
                for answer in answers:
                    if "ready" in answer:
                        one.device = answer["ready"]
                    else:
                        last = answer.pop("last")
                        assert one.case is not None
                        keep(Record(one.case.name, stage, device=one.device, **answer))
                        one.case = None
                        if last:  # its context is broken: another one goes on
                            drop(one)
                            break
                    hand_out(one)
            for one in list(living.values()):
                if time.monotonic() - one.since > one.limit():
                    broken += not one.ready
                    drop(one)
                    lose(one, FAILED, f"hung: killed after {one.limit():.0f} s")
    finally:
        for one in list(living.values()):
            drop(one)
            lose(one, DID_NOT_RUN, "no time left: cut while it ran")
        selector.close()
        reason = "no time left" if broken < BROKEN_STARTS else "its processes end before they are ready (stages.log)"
        for case in waiting:
            keep(Record(case.name, stage, DID_NOT_RUN if broken < BROKEN_STARTS else FAILED, reason))
