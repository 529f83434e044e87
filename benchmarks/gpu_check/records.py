"""What a case left behind: one line of JSON each, on the disk before the next case begins.

Several processes append to one file, and any of them may be killed at any time: a record is one write, begins on a line
of its own, and the last one of a name counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, DID_NOT_RUN = "passed", "failed", "did not run"
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Record:
    """A case's outcome. ``device``: what it ran on; ``detail``: a line for the report; ``data``: numbers."""

    name: str
    stage: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    device: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def append(path: Path, record: Record) -> None:
    line = "\n" + json.dumps(dataclasses.asdict(record), default=str) + "\n"  # what was cut before it stays apart
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> Iterator[Record]:
    """Every record in order; what is no whole record is passed over."""
    if not path.exists():
        return
    known = {f.name for f in dataclasses.fields(Record)}
    for line in path.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
            yield Record(**{k: v for k, v in content.items() if k in known})
        except (ValueError, TypeError, AttributeError):
            continue


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """By name, the last of each."""
    return {record.name: record for record in records}
