"""The correctness cases of each backend."""

from __future__ import annotations

from . import accuracy, behaviour, large, modules, paper, tilings
from .case import Case


def _all(backend: str) -> list[Case]:
    return [
        *accuracy.cases(backend), *modules.cases(backend), *paper.cases(backend), *behaviour.cases(backend),
        *large.cases(backend),
    ]  # fmt: skip


def cuda_cases() -> list[Case]:
    return [*_all("cuda"), Case("any/hakd_maps", accuracy.check_maps, rehearse=True)]


def triton_cases() -> list[Case]:
    return [*_all("triton"), *tilings.agreement()]
