"""A case: a name and what it does on a device. Stages are lists of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a stage's own process does without torch
    from .device import Device

Data = dict[str, Any]


class DidNotRun(Exception):
    """Why a case cannot be tried here: it is neither right nor wrong."""


class Wrong(AssertionError):
    """A wrong result, with the numbers that say so."""

    def __init__(self, message: str, data: Data) -> None:
        super().__init__(message)
        self.data = data


LIMITS = {"cuda": 40.0, "triton": 120.0}  # seconds of a case by backend: Triton compiles, on a busy machine


@dataclass(frozen=True)
class Case:
    """``run`` returns numbers for the record ("detail": a line for the report) or raises; ``backend``: which of ours it
    needs; ``rehearse``: whether it can run without a GPU; ``limit``: seconds after which it counts as hung."""

    name: str
    run: Callable[[Device], Data | None]
    backend: str | None = None
    rehearse: bool = False
    limit: float = 60.0


def load(source: str) -> list[Case]:
    """The cases of ``"package.module:function"``. Raises ValueError where two have one name."""
    module, _, function = source.partition(":")
    cases: list[Case] = getattr(importlib.import_module(module), function)()
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{source} has several cases named {', '.join(twice)}")
    return cases
