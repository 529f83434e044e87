"""What a report and its pictures ask of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MIB, GIB = 2**20, 2**30
BASELINES = {"reference": "eager", "compile": "torch.compile", "linear_cross_entropy": "linear_cross_entropy"}
COMPARED = ("whole_loss", "pixel_losses", "projection", "projected_losses")  # parts whose rows compare providers
Row = Mapping[str, Any]


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def two_digits(value: float) -> str:
    """Two significant ones, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def milliseconds(times: Row, mode: str = "both") -> str:
    """Median and quartiles."""
    median, low, high = (number(1e3 * value) for value in times[mode])
    return f"{median} ({low}-{high})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def ours(times: Row) -> list[str]:
    """Our backends among the providers."""
    return [name for name in times if name not in BASELINES]


def ratio(times: Row, baseline: str, backend: str) -> float:
    """Median of ``baseline`` over median of ``backend``."""
    return times[baseline]["both"][0] / times[backend]["both"][0]
