"""Processes of their own that need not import torch: a server has, and forks one for each command.

For tests of what another process does, or of what becomes of it; where a fresh interpreter is what is tested, or what a
command of ours starts, a real one is started.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torch.distributed")
TRAINER = ("heteroakd.cli", "heteroakd.commands.train")


@functools.cache
def server(modules: tuple[str, ...]) -> tuple[subprocess.Popen[str], Path]:
    """It ends with this process, and so does the folder with its processes' files."""
    folder = Path(tempfile.mkdtemp(prefix="processes"))
    command = [sys.executable, __file__, *modules]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    def end() -> None:
        started.stdin.close()
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return started, folder


class Process:
    """`python *arguments` (-c PROGRAM or -m MODULE, and theirs) in a session of its own, as `subprocess.Popen` has it;
    what it prints goes to ``stdout`` and ``stderr``, files of the test's or of its own."""

    def __init__(
        self, *arguments: str, modules: tuple[str, ...] = LIBRARIES, env: dict[str, str] | None = None,
        cwd: Path | None = None, stdout: Path | None = None, stderr: Path | None = None,
    ) -> None:  # fmt: skip
        python, folder = server(modules)
        folder = Path(tempfile.mkdtemp(dir=folder))
        self.args, self.returncode, self._status = arguments, None, folder / "status"
        self._printed = [stdout or folder / "stdout", stderr or folder / "stderr"]
        request = {
            "arguments": arguments, "env": dict(env or os.environ), "cwd": str(cwd or os.getcwd()),
            "printed": list(map(str, self._printed)), "status": str(self._status),
        }  # fmt: skip
        python.stdin.write(json.dumps(request) + "\n")
        python.stdin.flush()
        self.pid = int(self._words(1, time.monotonic() + 120)[0])

    def _words(self, count: int, deadline: float) -> list[str]:
        """What the server has written of the process: its number and, once it has ended, its status."""
        began = time.monotonic()
        while time.monotonic() < deadline:
            if self._status.exists() and len(words := self._status.read_text().splitlines()) >= count:
                return words
            time.sleep(0.005)
        raise subprocess.TimeoutExpired(self.args, deadline - began)

    def poll(self) -> int | None:
        if self.returncode is None and len(words := self._status.read_text().splitlines()) == 2:
            self.returncode = int(words[1])
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        self._words(2, time.monotonic() + timeout)
        return self.poll()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text() for path in self._printed)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A `Process` to its end."""
    process = Process(*arguments, **options)
    try:
        out, err = process.communicate(300)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _serve() -> dict[str, Any] | None:
    """In a process of its own for each request, that request; in the server, at its end, None."""
    for line in sys.stdin:
        if not os.fork():
            return json.loads(line)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that waited for a process that has ended
                pass
        except ChildProcessError:
            pass
    return None


def _wait(pid: int, status: Path) -> None:
    with open(status, "w") as file:
        print(pid, file=file, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=file, flush=True)
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """What the request asks for, from the first line of its program on."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # as on a terminal
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for target, name in enumerate([os.devnull, *request["printed"]]):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT if target else os.O_RDONLY), target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    importlib.invalidate_caches()
    kind, what, *rest = request["arguments"]
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]  # which no user has
    for module in sys.argv[1:]:
        importlib.import_module(module)
    if cli := sys.modules.get("heteroakd.cli"):  # as conftest.one_parser
        cli.build_parser = functools.cache(cli.build_parser)
        cli.build_parser()
    if (asked := _serve()) is not None:
        if child := os.fork():
            _wait(child, Path(asked["status"]))
        _become(asked)
