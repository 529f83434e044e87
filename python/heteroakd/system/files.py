"""The files of a run: their names, writing that never leaves half a file, and one run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from heteroakd.system.distributed import on_main

LAST, BEST, CONFIG, SUMMARY, METRICS = "last.pt", "best.pt", "config.yaml", "summary.json", "metrics.jsonl"
PICTURES, MAPS, EVENTS, LOCK = "pictures", "maps", "events.out.tfevents", "run.lock"
REPORT, COMPARISON, COMPARISON_RESULTS = "report.html", "comparison.md", "comparison.json"
TEMPORARY = ".heteroakd-"
OF_A_RUN = (
    *(LAST, "last.*.pt", BEST, CONFIG, SUMMARY, METRICS, f"{EVENTS}.*", REPORT),
    *(f"{PICTURES}/step_*.png", f"{MAPS}/step_*.npz"),
)
"""Patterns of what a run, and a report of it, write into its folder."""


def step_file(folder: Path, step: int, image: int, suffix: str) -> Path:
    """The file of a val image's panel (.png, in PICTURES) or maps (.npz, in MAPS) after a step."""
    return folder / f"step_{step:06d}_val_{image:02d}{suffix}"


def step_files(folder: Path, suffix: str) -> dict[tuple[int, int], Path]:
    """What `step_file` names in a folder, by step and val image, in their order; a user's own files are none of it."""
    matches = ((re.fullmatch(rf"step_(\d+)_val_(\d+)\{suffix}", path.name), path) for path in folder.glob(f"*{suffix}"))
    return dict(sorted(((int(match[1]), int(match[2])), path) for match, path in matches if match))


def older(path: Path, age: int) -> Path:
    """Where the file that was at `path` `age` versions ago is kept: last.1.pt of last.pt; `path` itself for 0."""
    return path.with_suffix(f".{age}{path.suffix}") if age else path


@contextmanager
def atomic_file(path: Path, *, keep: int = 1) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path`, complete and on disk, when the block ends; after an error `path` is as it
    was. Up to `keep` - 1 files that were there before stay, as `older(path, 1)` and so on. Raises OSError where it
    cannot be written.

    No library does both, the fsync of file and folder and the older versions: a kill -9 or a power cut costs nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is not the file's, which may be as long as a name can be.
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide it from a group that shares the folder
            for age in range(keep - 1, 0, -1):
                if older(path, age - 1).is_file():
                    os.replace(older(path, age - 1), older(path, age))
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a crash
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    remove_leftovers(path.parent)
    with atomic_file(path) as file:
        file.write(text.encode())


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be written, before what it shall hold is computed."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: --output names the file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written there ({error.strerror}): --output names another file") from error


def remove_leftovers(folder: Path) -> None:
    """Delete what `atomic_file` was writing into a folder, or into those of a run's pictures and maps in it, when its
    process was killed; not what another process writes."""
    for path in (path for place in ("", PICTURES, MAPS) for path in (folder / place).glob(f"{TEMPORARY}*.tmp")):
        with suppress(OSError), path.open("r+b") as file:
            if _lock(file):
                path.unlink(missing_ok=True)


def _lock(file: IO[bytes]) -> bool:
    """Hold an open file by the system's lock until it is closed; False where another process does, or there are no
    locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear_output(folder: Path) -> None:
    """Delete what an earlier run wrote into the folder, and nothing else."""
    for path in [path for pattern in OF_A_RUN for path in folder.glob(pattern)]:
        path.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk does not say which file it was: an OSError without a name gets this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, for two runs would replace each other's checkpoints; the main process holds it for all.

    The system's own lock, because it gives it back when the process ends, however it ends; a lock file of a library
    outlives a kill -9. Raises ValueError where another process holds it.
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
