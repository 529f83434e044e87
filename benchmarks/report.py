"""``python -m benchmarks.report runs/benchmarks.json``: the measurements as docs/performance.md with its pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import timing
from .gpu_check import chapter
from .results import BASELINES, COMPARED, GIB, MIB, Row, markdown, milliseconds, number, ours, ratio, two_digits

HEAD = """\
# Performance

<!-- Written by benchmarks/report.py from the measurements of `make bench`; changes by hand are lost. -->

{machine}.

Forward and backward. The providers of a case run in turns in one process, after a warm-up; a time is the median of the
rounds with its quartiles. An element is one class at one pixel of the loss grid. A ratio is the other's time over ours:
above 1 we are faster. What is asked of a case stands beside its ratio, the least acceptable in brackets: *met*,
*acceptable* (the least is met) or **missed**. **slower** marks every case that we lose. Tables are measured minutes
apart, and a machine's speed wanders: a case that stands in two of them has two times, and a ratio is one row's.
"""

NOWHERE = """\
No case of the comparisons below is slower than eager or torch.compile. What was asked and **missed** is said there.
"""

WHOLE_TEXT = """\
`HeteroAKDLoss` in training mode, B = 1, with its defaults (projections with batch norm included, all four terms at the
labels' resolution) or as the case says. Gradients: of the student's features and logits and of both projectors. Eager
is the module with `backend="reference"`: torch's layers and the reference's formulas. R101 and R18 are ResNets at
stride 8 with 2048 and 512 channels, MBV2 a MobileNetV2 at stride 8 with 320, MiT-B4 and B0 the last stages of
SegFormers at stride 32 with 512 and 256; labels 512x1024, at K = 150 512x512.
"""

PIXEL_TEXT = """\
Losses on logits; float32 unless the case says otherwise. `hakd` interpolates the logits of both networks to the
labels unless it says "feature resolution"; `tiny` is [1, 2, 8, 8] to 64x64.
"""

PROJECTION_TEXT = """\
`PixelProjector` of both networks alone (R101 -> R18, as above), convolution and batch norm in training mode: gradients
of the student's features and of all parameters, for given gradients of the logits. Operations and bytes: every feature
read twice, since the statistics stand between, and the student's gradient written once.
"""

PROJECTED_TEXT = """\
Losses on features, with the 1x1 projections of both networks; weights float32, every weight and the student's
features get gradients. Operations are those of the projections, bytes those of reading each feature once and writing
the student's gradient once. `torch.nn.functional.linear_cross_entropy` (chunked) computes one projection and its
cross-entropy and nothing else here, so it stands beside that case alone; it wants the channels last, and its time has
the copy.
"""

MODES_TEXT = """\
Medians in milliseconds. Our forward computes loss and gradient together and our backward only scales, so only the sum
compares with others.
"""

VARIANTS_TEXT = """\
Our backend alone; hakd K=19 (or CE + KD where the group says so) with one thing changed. "Against the first" is time
per element over that of the group's first line.
"""

MEMORY_TEXT = """\
Peak of one forward and backward beyond its inputs, MiB, a fresh process for each: by torch's allocator, which does
not see what our kernels keep for each thread, and by the process's resident size, which sees everything and is
coarser. Both contain the gradients; the share leaves them out.
"""

PREDICTED_TEXT = """\
**Predicted**, not measured: peak of HeteroAKDLoss with its defaults, forward and backward, beyond its inputs, from
the shapes of all tensors that are alive (fake tensors). What an operator needs inside is not in it; ours is small
enough to be measured as well, which has it.
"""

TRAIN_TEXT = """\
One step of `heteroakd distill`: teacher forward (FPN, EfficientNet-Lite0), student forward (SegFormer, MiT-B0, or
DeepLabV3, ResNet-18 at stride 8), HeteroAKDLoss, backward, AdamW; random weights and images. "Before" computes the loss
by the eager reference, "after" by our backend; the loss alone is its forward and backward, projectors included, on the
same maps, and its share is of the whole step.
"""

SCALING_TEXT = """\
`hakd_loss`, T = 2, labels at 8 times the grid of the logits: K = 19, B = 1 by resolution; 128x256, B = 1 by classes;
K = 19, 256x512 by batch.
"""


def verdict(value: float, should: float, least: float) -> str:
    """Of a ratio that should be large, to two decimals: met, acceptable or missed."""
    value = round(value, 2)
    return "met" if value >= should else "acceptable" if value >= least else "**missed**"


def _ratio_cell(row: Row, baseline: str, backend: str) -> str:
    if baseline not in row["times"]:
        return "-"
    value = ratio(row["times"], baseline, backend)
    cell = f"{number(value)}x"
    if round(value, 2) < 1:
        cell += ", **slower**"
    if baseline in row["asked"]:
        should, least = row["asked"][baseline]
        asked = f"{should:g}x" if should == least else f"{should:g}x ({least:g}x)"
        cell += f"; asked {asked}: {verdict(value, should, least)}"
    if baseline == "reference" and row.get("allowance") is not None:
        extra = row["times"][backend]["both"][0] - row["times"][baseline]["both"][0]
        kept = "met" if extra <= row["allowance"] else "**missed**"
        cell += f"; asked within {1e6 * row['allowance']:.0f} us: {kept}"
    return cell


def comparison_table(rows: Sequence[Row]) -> str:
    """One line per case and backend of ours: milliseconds, ns per element, ratios beside what is asked."""
    present = [b for b in BASELINES if any(b in row["times"] for row in rows)]
    head = ["case", *(f"{BASELINES[b]} ms" for b in present), "ours", "ours ms", "ns/element"]
    head += [f"against {BASELINES[b]}" for b in present]
    lines = []
    for row in rows:
        times = row["times"]
        for backend in ours(times):
            lines.append(
                [
                    row["case"],
                    *(milliseconds(times[b]) if b in times else "-" for b in present),
                    backend,
                    milliseconds(times[backend]),
                    f"{1e9 * times[backend]['both'][0] / row['elements']:.2f}",
                    *(_ratio_cell(row, b, backend) for b in present),
                ]
            )
    return markdown(head, lines)


def modes_table(rows: Sequence[Row]) -> str:
    """Forward and backward apart."""
    names = [n for n in (*BASELINES, *ours(rows[0]["times"])) if any(n in row["times"] for row in rows)]
    head = ["case", *(f"{BASELINES.get(n, f'ours ({n})')} {mode}" for n in names for mode in ("forward", "backward"))]
    lines = [
        [row["case"], *(number(1e3 * row["times"][n][mode][0]) if n in row["times"] else "-"
                        for n in names for mode in ("fwd", "bwd"))]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def rates_table(rows: Sequence[Row]) -> str:
    """Arithmetic and traffic of the projected losses, and the rates that our times mean."""
    lines = []
    for row in rows:
        for backend in ours(row["times"]):
            seconds = row["times"][backend]["both"][0]
            rates = (row["operations"] / 1e9, row["bytes"] / 1e6, row["operations"] / seconds / 1e9,
                     row["bytes"] / seconds / 1e9)  # fmt: skip
            lines.append([row["case"], backend, *(number(rate) for rate in rates)])
    return markdown(["case", "ours", "GFLOP", "MB", "GFLOP/s", "GB/s"], lines)


def variants_table(groups: Sequence[Row]) -> str:
    lines = []
    for group in groups:
        first = None
        for row in group["rows"]:
            each = row["times"]["both"][0] / row["elements"]
            first = first or each
            relative = round(each / first, 2)
            asked = "-"
            if row["limit"]:
                sign, limit = row["limit"]
                met = relative <= limit if sign == "<=" else relative >= limit
                asked = f"{sign} {limit:g}: {'met' if met else '**missed**'}"
            lines.append([group["group"], row["label"], group["backend"], milliseconds(row["times"]),
                          f"{1e9 * each:.2f}", f"{relative:.2f}", asked])  # fmt: skip
        lines += [[group["group"], label, group["backend"], f"not measured: {why}", "-", "-", "-"]
                  for label, why in group["missing"].items()]  # fmt: skip
    return markdown(["group", "variant", "ours", "ms", "ns/element", "against the first", "asked"], lines)


def scaling_table(scaling: Sequence[Row]) -> str:
    """Every point of the series: milliseconds, ns per element, peak by torch's allocator."""
    lines = []
    for series in scaling:
        for point in series["points"]:
            times, memory = point["times"], point.get("memory", {})
            for backend in ours(times):
                lines.append(
                    [
                        point["case"],
                        milliseconds(times["reference"]),
                        milliseconds(times[backend]),
                        f"{1e9 * times[backend]['both'][0] / point['elements']:.2f}",
                        f"{number(ratio(times, 'reference', backend))}x",
                        *(number(memory[n]["allocator"] / MIB) if n in memory else "-" for n in ("reference", backend)),
                    ]
                )
    head = ["case", "eager ms", "ours ms", "ours ns/element", "against eager", "eager MiB", "ours MiB"]
    return markdown(head, lines)


def memory_table(rows: Sequence[Row], asked: Mapping[str, float]) -> str:
    """Measured peaks; ``asked`` holds the largest share of eager's peak that a case may take."""
    lines = []
    for row in rows:
        peaks = row["peaks"]
        for backend in (name for name in peaks if name != "reference"):
            eager, mine = peaks["reference"], peaks[backend]
            beyond = [max(p["allocator"] - p["gradients"], 0) for p in (mine, eager)]
            share = beyond[0] / max(beyond[1], 1)
            cell = f"{two_digits(100 * share)} %"
            if row["case"] in asked and backend not in BASELINES:
                limit = asked[row["case"]]
                cell += f"; asked {100 * limit:g} %: {'met' if share <= limit else '**missed**'}"
            cells = [number(p[key] / MIB) for p in (eager, mine) for key in ("allocator", "resident")]
            lines.append([row["case"], backend, *cells, number(mine["gradients"] / MIB), cell])
    head = ["case", "provider", "eager allocator", "eager resident", "allocator", "resident", "gradients",
            "share beyond gradients"]  # fmt: skip
    return markdown(head, lines)


def predicted_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        eager = row["peaks"]["reference"]
        for backend in ours(row["peaks"]):
            mine = row["peaks"][backend]
            peaks = [row["measured"][backend][key] for key in ("allocator", "resident")]
            lines.append([row["case"], row["assumptions"], backend, *(f"{b / GIB:.2f}" for b in (eager, mine, *peaks)),
                          f"{two_digits(100 * mine / eager)} %"])  # fmt: skip
    head = ["case", "maps", "ours", "eager GiB (predicted)", "ours GiB (predicted)", "ours GiB (measured, allocator)",
            "ours GiB (measured, resident)", "predicted share"]  # fmt: skip
    return markdown(head, lines)


def train_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times = row["times"]
        for backend in row["backends"]:
            steps, losses = ([times[f"{part}, {b}"] for b in ("reference", backend)] for part in ("step", "loss"))
            shares = [100 * loss["both"][0] / step["both"][0] for loss, step in zip(losses, steps, strict=True)]
            faster = steps[0]["both"][0] / steps[1]["both"][0]
            lines.append(
                [
                    f"{row['case']}, {row['size']}",
                    backend,
                    *(milliseconds(step) for step in steps),
                    f"{number(faster)}x" + (", **slower**" if round(faster, 2) < 1 else ""),
                    *(f"{milliseconds(x)}, {share:.0f} %" for x, share in zip(losses, shares, strict=True)),
                ]
            )
    head = ["pair", "ours", "step before, ms", "step after, ms", "step faster", "loss before, ms, share",
            "loss after, ms, share"]  # fmt: skip
    return markdown(head, lines)


def losses(rows: Iterable[Row]) -> list[str]:
    """The comparisons that we lose, in words."""
    return [
        f"{row['case']}: {number(1 / ratio(row['times'], baseline, backend))}x the time of {name} ({backend})"
        for row in rows
        for backend in ours(row["times"])
        for baseline, name in BASELINES.items()
        if baseline in row["times"] and round(ratio(row["times"], baseline, backend), 2) < 1
    ]


def _memory_asked(results: Row) -> dict[str, float]:
    """Cases of losses on logits whose extra memory is bounded, as a share of eager's."""
    return {row["case"]: 0.01 for row in results.get("pixel_losses", ())}


def page(results: Row, pictures: Mapping[str, str]) -> str:
    """docs/performance.md; ``pictures`` are the paths of those that were drawn, relative to it."""
    parts = [HEAD.format(machine=timing.describe(results["machine"]))]

    def add(part: str, title: str, *texts: str) -> None:
        if part in results:
            parts.append(f"## {title}\n")
            parts.extend(text for text in texts if text)

    def picture(name: str, text: str) -> str:
        return f"![{text}]({pictures[name]})\n" if name in pictures else ""

    compared = [row for part in COMPARED for row in results.get(part, ())]
    lost = losses(compared)
    if compared:
        parts.append("## Where we lose\n")
        parts.append("".join(f"- {line}\n" for line in lost) or NOWHERE)
        parts.append(picture("ratios", "Our speed against eager and torch.compile, by case"))
    add("whole_loss", "The whole loss", WHOLE_TEXT, comparison_table(results.get("whole_loss", ())))
    pixel, projection, projected = (results.get(p, ()) for p in ("pixel_losses", "projection", "projected_losses"))
    if pixel:
        add("pixel_losses", "Losses on logits", PIXEL_TEXT, comparison_table(pixel))
    if projection:
        add("projection", "The projections alone", PROJECTION_TEXT, comparison_table(projection),
            rates_table(projection))  # fmt: skip
    if projected:
        add("projected_losses", "Losses on features", PROJECTED_TEXT, comparison_table(projected),
            rates_table(projected))  # fmt: skip
    if compared:
        parts += ["## Forward and backward apart\n", MODES_TEXT, modes_table(compared)]
    add("train_step", "A whole distillation step", TRAIN_TEXT, train_table(results.get("train_step", ())))
    add("variants", "Options, dtypes, grids, threads", VARIANTS_TEXT, variants_table(results.get("variants", ())))
    add("scaling", "Time and memory against size", SCALING_TEXT,
        picture("time", "Time of forward and backward against resolution, classes and batch"),
        picture("memory", "Peak memory against resolution, classes and batch"),
        scaling_table(results.get("scaling", ())))  # fmt: skip
    add("memory", "Memory", MEMORY_TEXT, memory_table(results.get("memory", ()), _memory_asked(results)))
    add("predicted", "Memory at the paper's sizes", PREDICTED_TEXT, predicted_table(results.get("predicted", ())))
    return "\n".join(part for part in parts if part)


def write(results: Row, target: Path) -> None:
    """Writes ``target`` and its pictures into pictures/ beside it."""
    from . import plots  # needs matplotlib

    drawn = plots.draw(results, target.parent / "pictures")
    target.parent.mkdir(parents=True, exist_ok=True)
    measured = chapter.kept(target.read_text() if target.exists() else "")
    text = page(results, {name: f"pictures/{path.name}" for name, path in drawn.items()})
    target.write_text(f"{text.rstrip()}\n\n{measured}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what benchmarks.run wrote")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args(argv)
    write(json.loads(arguments.results.read_text()), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
