"""One run at a time in an output folder: two would replace each other's checkpoints."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from heteroakd.system.distributed import on_main

LOCK = "run.lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends, however it ends. The main process
    holds it for all.

    Raises ValueError where another process does.
    """
    held: list[IO[str]] = []

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the loader's workers
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ValueError(
                f"{folder}: another process is training into this folder (it holds {LOCK}): wait for it or end it, or "
                "name another folder by --output"
            ) from error
        except OSError:  # a file system without locks
            pass
        held.append(file)

    on_main(acquire)
    try:
        yield
    finally:
        for file in held:
            file.close()
