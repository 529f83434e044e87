"""Diagrams of a report as SVG elements whose text and axes take the page's colour, light or dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from heteroakd.evaluation.fonts import families_for

# After Okabe and Ito: distinguishable by colour-blind readers; mid tones that hold on white and on near-black.
_COLOURS = ("#2b8ccf", "#d55e00", "#009e73", "#cc79a7", "#56c5e9", "#e69f00", "#8c7ae6", "#999999")
_LINES = ("-", "--", "-.", ":")
_INK = "#123456"  # a stand-in that is replaced by currentColor; no series has this colour
_NUMBERED = 12  # classes up to which a matrix shows its numbers
_NAMED = 64  # and its names
_WIDTH, _FONT_SIZE = 5.2, 12  # inches and points: 11 pixels on a phone's 360


@dataclass(frozen=True)
class Curve:
    """A diagram of one or more series of points."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Points (x, y) by name; points that are not finite leave a gap."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, a group of them per category."""

    title: str
    x_label: str
    categories: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    """Values by name, as many as there are categories; None leaves a gap."""


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix, each row divided by its sum."""

    title: str
    names: Sequence[str]
    """K classes."""
    counts: Sequence[Sequence[int]]
    """[K, K], by labelled class (row) and predicted class (column); a row without counts stays empty."""


Diagram = Curve | Bars | Matrix
_STYLE: dict[Any, Any] = {
    "font.size": _FONT_SIZE,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "grid.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "grid.alpha": 0.15,
    "axes.axisbelow": True,
}


def svg(diagram: Diagram) -> str:
    """The diagram as an SVG element."""
    drawn: dict[type, Callable[[Any], Figure]] = {Curve: _curve, Bars: _bars, Matrix: _matrix}
    buffer = io.StringIO()
    # No metadata: its date would make equal reports differ, and its addresses are references to the outside.
    metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    families = families_for("".join(sorted(set(repr(diagram)))))
    # The salt makes the names of clip paths and markers, random otherwise, a function of the diagram.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"salt {diagram.title}", "font.family": families}):
        drawn[type(diagram)](diagram).savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])  # an HTML page needs no name spaces
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(diagram.title, quote=True)}"', 1)


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: it leaves names that begin with "_" out of legends, and takes what stands
    between two "$" for a formula."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _curve(curve: Curve) -> Figure:
    figure = Figure(figsize=(_WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curve.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        style = _LINES[number // len(_COLOURS) % len(_LINES)]
        finite = [(x, y) if math.isfinite(x) and math.isfinite(y) else (math.nan, math.nan) for x, y in points]
        marker = "o" if len(points) <= 30 else ""
        axes.plot(
            [x for x, _ in finite], [y for _, y in finite], style, color=colour, label=_plain(name), linewidth=1.8,
            marker=marker, markersize=3.5,
        )  # fmt: skip
    axes.set(xlabel=curve.x_label, ylabel=curve.y_label)
    axes.grid()
    if curve.series:
        figure.legend(loc="outside upper center", ncols=2)  # over no curve
    return figure


def _bars(bars: Bars) -> Figure:
    count = max(1, len(bars.series))
    height = 0.8 / count
    tall = max(2.0, 1.1 + len(bars.categories) * (0.15 + 0.13 * count))
    figure = Figure(figsize=(_WIDTH, tall), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(bars.categories))
    for number, (name, values) in enumerate(bars.series.items()):
        widths = [math.nan if value is None else value for value in values]
        offset = (number - (count - 1) / 2) * height
        axes.barh(places + offset, widths, height, color=_COLOURS[number % len(_COLOURS)], label=_plain(name))
    axes.set_yticks(places, [*map(_plain, bars.categories)])
    axes.invert_yaxis()
    axes.set_xlabel(bars.x_label)
    axes.grid(axis="x")
    if count > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _matrix(matrix: Matrix) -> Figure:
    counts, size = np.asarray(matrix.counts, dtype=np.float64), len(matrix.names)
    sums = counts.sum(1, keepdims=True)
    shares = np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)
    side = min(9.0, max(4.5, 1.6 + 0.3 * size))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # One colour, as opaque as the share is large: it stands on a light page as on a dark one.
    picture = np.zeros((size, size, 4))
    picture[..., :3] = matplotlib.colors.to_rgb(_COLOURS[0])
    picture[..., 3] = shares
    axes.imshow(picture, interpolation="nearest")
    if size <= _NAMED:
        names = [*map(_plain, matrix.names)]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
    for row, column in np.argwhere(shares >= 0.005) if size <= _NUMBERED else ():
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=11)
    axes.set(xlabel="predicted", ylabel="labelled")
    axes.tick_params(labelsize=_FONT_SIZE if size <= _NUMBERED else 8 if size <= 30 else 5)
    axes.spines[:].set_visible(True)
    return figure
