"""Other programs: found, run within a time, and ended with everything they started."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .case import DidNotRun, Wrong

ROOT = Path(__file__).parents[2]
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute/*")
# What the tools say where the machine, not the program, is the reason.
REFUSED = re.compile(
    r"ERR_NVGPUCTRPERM|not supported|Failed to (?:initialize|load|find|prepare|open|attach)|LibraryNotLoaded|"
    r"Unable to|permission|could not (?:initialize|find|load)|No kernels were profiled",
    re.I,
)


@dataclass(frozen=True)
class Done:
    """``status`` is None where the time was up."""

    status: int | None
    output: str

    def refusal(self) -> str | None:
        """The line in which the machine refuses."""
        return next((line.strip() for line in self.output.splitlines() if REFUSED.search(line)), None)

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.output.strip().splitlines()[-lines:])


def find(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    folders = [folder for place in PLACES for folder in sorted(Path("/").glob(place[1:]), reverse=True)]
    return next((str(f / name) for f in folders if os.access(f / name, os.X_OK) and (f / name).is_file()), None)


def watcher(tool: str, target: Sequence[str], on_gpu: bool, seconds: float, log: Path) -> str:
    """The path of a ``tool`` that is to watch ``target``. Without a GPU ``target`` is rehearsed on its own.

    Raises Wrong where it fails then, DidNotRun where it does not or the tool is not there.
    """
    if not on_gpu:
        done = run(target, seconds, log)
        if done.status:
            raise Wrong(f"the calls that it would be shown do not run ({log.name})", {"tail": done.tail(30)})
        raise DidNotRun("needs a GPU; the calls that it would be shown ran")
    program = find(tool)
    if program is None:
        raise DidNotRun(f"{tool} is not there")
    return program


def descendants(process: int) -> list[int]:
    """Of a process, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, level = [], [process]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def run(command: Sequence[str], seconds: float, log: Path | None = None, **environment: str) -> Done:
    """Runs ``command`` in the source tree. What it prints goes to the end of ``log``, too, when it is done."""
    with tempfile.TemporaryFile() as said:  # no pipe: what it leaves running could hold that open
        status = _wait(command, seconds, said, environment)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if log is not None:
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n{output}\n")
    return Done(status, output)


def run_into(log: Path, command: Sequence[str], seconds: float, **environment: str) -> Done:
    """As :func:`run`, ``log`` being written as it goes: it is there whatever happens."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        status = _wait(command, seconds, file, environment)
    with log.open("rb") as file:
        file.seek(begin)
        return Done(status, file.read().decode(errors="replace"))


def _wait(command: Sequence[str], seconds: float, output: IO[bytes], environment: dict[str, str]) -> int | None:
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for one in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        return None


def folder() -> Path:
    """Where this check saves everything."""
    return Path(os.environ.get("GPU_CHECK_FOLDER", "."))


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu_check.{module}", *arguments]
