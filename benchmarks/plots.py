"""The pictures of docs/performance.md: SVG without a background, in colours that read on white and on black."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from .results import BASELINES, COMPARED, MIB, number, ours, ratio  # noqa: E402

GREY = "#848d97"
DARK_GREY = "#69717a"  # reads on the bars too
COLOURS = {"reference": "#d9822b", "compile": "#9b6ddb", "linear_cross_entropy": "#c9568a"}
OUR_COLOURS = ("#2f96d6", "#35a35f", "#b59a1f")
STYLE = {
    "svg.hashsalt": "hetero-kernels",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
                             "ytick.color", "grid.color", "legend.labelcolor")},
}  # fmt: skip


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": "benchmarks/plots.py"})
    plt.close(figure)
    # matplotlib leaves blanks at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _colour(name: str, backends: Sequence[str]) -> str:
    return COLOURS.get(name) or OUR_COLOURS[backends.index(name) % len(OUR_COLOURS)]


def draw_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Bars: time of every baseline over ours, by case; a tick where the asked ratio is."""
    bars = [
        (row, baseline, backend)
        for row in rows
        for backend in ours(row["times"])
        for baseline in BASELINES
        if baseline in row["times"]
    ]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.3 * len(bars) + 0.12 * len(rows)))
    y, places, labels, named = 0.0, [], [], set()
    several = len({backend for _, _, backend in bars}) > 1
    for index, (row, baseline, backend) in enumerate(bars):
        if index and bars[index - 1][0] is not row:
            y += 0.5
        value = ratio(row["times"], baseline, backend)
        label = None if baseline in named else f"against {BASELINES[baseline]}"
        named.add(baseline)
        axes.barh(y, value - 1, left=1, height=0.85, color=COLOURS[baseline], label=label)
        axes.text(1.01, y, f"{number(value)}x", transform=axes.get_yaxis_transform(), va="center")
        if baseline in row["asked"] and row["asked"][baseline][0] != 1:
            axes.plot([row["asked"][baseline][0]] * 2, [y - 0.5, y + 0.5], color=DARK_GREY, lw=3.5)
        places.append(y)
        labels.append(row["case"] + (f" ({backend})" if several else ""))
        y += 1
    # One label per case, at the middle of its bars.
    centres = {label: sum(p for p, t in zip(places, labels, strict=True) if t == label) / labels.count(label)
               for label in labels}  # fmt: skip
    axes.set_yticks(list(centres.values()), list(centres))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xscale("log")
    axes.axvline(1, color=GREY, lw=1.5)
    axes.margins(x=0.02, y=0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.invert_yaxis()
    axes.set_xlabel("times faster, logarithmic (left of 1x: slower); grey ticks: asked")
    figure.legend(loc="outside upper center", ncols=3)
    return _save(figure, path)


def draw_series(
    scaling: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any], str], float], label: str, path: Path
) -> Path:
    """A panel per series, both axes logarithmic: ``value(point, provider)`` of eager and ours."""
    figure, panels = plt.subplots(1, len(scaling), figsize=(9.6, 4.0), squeeze=False)
    for axes, series in zip(panels[0], scaling, strict=True):
        _panel(axes, series, value)
    panels[0][0].set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return _save(figure, path)


def draw_equal_time(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """mIoU over minutes of training, a line a run: the eager loss and ours (rows of ``equal_time.train``)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4))
        backends = [backend for backend in dict.fromkeys(row["backend"] for row in rows) if backend not in BASELINES]
        named = set()
        for row in rows:
            name = row["backend"]
            label = None if name in named else BASELINES.get(name, f"ours ({name})")
            named.add(name)
            axes.plot(
                row["minutes"], [100 * value for value in row["miou"]], "o-", color=_colour(name, backends), label=label
            )
        axes.set(xlabel="minutes of training", ylabel="mIoU, percent", xlim=(0, None))
        figure.legend(loc="outside upper center", ncols=len(named))
        return _save(figure, path)


def _panel(axes: Axes, series: Mapping[str, Any], value: Callable[[Mapping[str, Any], str], float]) -> None:
    points = series["points"]
    backends = ours(points[0]["times"])
    x = [point["x"] for point in points]
    for name in points[0]["times"]:
        text = BASELINES.get(name, f"ours ({name})")
        axes.plot(x, [value(p, name) for p in points], "o-", color=_colour(name, backends), label=text)
    axes.set_xscale("log")
    axes.set_yscale("log")
    apart = [v for v, after in zip(x, [*x[1:], None], strict=True) if after is None or after / v > 2.2 or len(x) < 6]
    axes.set_xticks(apart, [f"{v:.2g}" if v < 1 else f"{round(v, 1):g}" for v in apart])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_xlabel(series["quantity"])


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draws what ``results`` holds; paths by name ("ratios", "time", "memory")."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        compared = [row for part in COMPARED for row in results.get(part, ())]
        if compared:
            drawn["ratios"] = draw_ratios(compared, folder / "performance-ratios.svg")
        scaling = results.get("scaling", ())
        if scaling:
            drawn["time"] = draw_series(scaling, lambda point, name: 1e3 * point["times"][name]["both"][0],
                                        "milliseconds", folder / "performance-time.svg")  # fmt: skip
            if all("memory" in point for series in scaling for point in series["points"]):
                drawn["memory"] = draw_series(scaling, lambda point, name: point["memory"][name]["allocator"] / MIB,
                                              "peak memory, MiB", folder / "performance-memory.svg")  # fmt: skip
    return drawn
