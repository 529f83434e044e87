"""The tests that tests/README.md names beside the planted mistakes: they must go on being run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mutations import CUDA_MUTATIONS, MUTATIONS, ROOT, Suite


def witnesses(suite: Suite) -> dict[str, tuple[str, str]]:
    """Of each mistake in the suite's table the file and the name of the test that noticed it."""
    text = (ROOT / "tests" / "README.md").read_text().split(suite.begin)[1].split(suite.end)[0]
    files = {m.name: m.within or suite.tests for m in (*MUTATIONS, *CUDA_MUTATIONS) if m.suite is suite}
    rows = re.findall(r"^\| (\S+) \| .* \| `(.*)` \|$", text, re.M)
    assert sorted(name for name, _ in rows) == sorted(files), "the table is not of these mistakes"
    return {name: (files[name], test) for name, test in rows}


def lost(suite: Suite, items: Iterable[Any]) -> list[str]:
    """Mistakes whose witness is none of pytest's items."""
    there = {(item.path.relative_to(ROOT).as_posix(), item.name) for item in items}
    return [name for name, witness in witnesses(suite).items() if witness not in there]


def check(suite: Suite, session: pytest.Session) -> None:
    """As ``make test`` runs the suite's folder; who asks for files or names of tests does not ask for witnesses."""
    folder, config = Path(suite.tests).parent.name, session.config
    whole = folder in (Path(argument).name for argument in config.args) and config.option.keyword in ("", "triton")
    if not whole or config.option.lf or config.option.deselect:
        pytest.skip(f"where all of {folder} is run")
    assert lost(suite, session.items) == []
