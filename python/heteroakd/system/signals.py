"""Ctrl-C, SIGTERM, SIGHUP: a run ends after the step it is at, with a checkpoint, instead of in the middle of it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a batch system's notice, a terminal that is closed."""
_NOTE = b"\nstopping after this step, with a checkpoint; Ctrl-C once more stops at once, without\n"


class StoppedError(Exception):
    """A run was stopped by a signal, and can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def stopped(step: int, steps: int, checkpoint: Path, signal_number: int) -> StoppedError:
    """What a run of `steps` raises after `step` of them, when its checkpoint is written."""
    return StoppedError(
        f"stopped at step {step} of {steps}; the same command with --resume continues from {checkpoint}", signal_number
    )


class StopRequest:
    """While the context lasts, the first of SIGNALS is noted in `signal_number`.

    A SIGINT after it raises KeyboardInterrupt; another says nothing new: `timeout`, and torchrun under a batch system,
    pass on what the process itself gets, too. A signal that is ignored stays so; outside of the main
    thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a script's "&" want it
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, _NOTE)  # print() may be what the signal interrupted
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def reader_may_leave(stream: TextIO, *, needed: bool = False) -> Iterator[None]:
    """What cannot be written to a terminal, pipe or full disk is dropped: `| tee log`, which the Ctrl-C that stops a
    run ends too, must not cost it its checkpoint. With `needed` a disk that takes nothing is an OSError."""
    try:
        yield
    except OSError as error:
        gone = error.errno in (errno.EPIPE, errno.EIO)
        if gone or needed:  # for good: and what is buffered must not fail once more at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        if needed and not gone:
            error.filename = error.filename or stream.name
            raise


def leave_signals_to_the_parent(worker: int) -> None:
    """For a DataLoader's workers: the step that is to be finished needs them. In a process group of their own they do
    not get what a terminal, torchrun or `timeout` sends to the parent's; SIGTERM is how the parent ends them."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
