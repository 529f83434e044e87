"""The tables of the report and of the documentation, from records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .device import REHEARSAL
from .ncu import SHOWN
from .records import PASSED, Record

Found = Mapping[str, Record]
KERNELS = {"cuda": "CUDA", "triton": "Triton"}
PROVIDERS = {**KERNELS, "reference": "eager", "compile": "torch.compile"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, or nothing where there is no row."""
    lines = ["| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, "-" for nothing."""
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def measured(found: Found) -> dict[str, Record]:
    """What passed on a GPU."""
    return {k: r for k, r in found.items() if r.status == PASSED and r.device not in ("", REHEARSAL)}


def data(found: Found, name: str) -> dict[str, Any]:
    record = found.get(name)
    return record.data if record is not None and record.status == PASSED else {}


def predictions(found: Found) -> dict[tuple[str, str], float]:
    """Milliseconds by size and backend."""
    rows = {(name, "cuda"): row["ms"] for name, row in data(found, "predicted/cuda").get("rows", {}).items()}
    for name, record in found.items():
        if name.startswith("predicted/") and name.endswith(", triton") and record.status == PASSED:
            rows[name[len("predicted/") : -len(", triton")], "triton"] = record.data["ms"]
    return rows


def times(found: Found) -> str:
    """Ours beside eager and torch.compile; the bandwidth is of the least bytes that a step moves."""
    rows = [r.data for n, r in found.items() if n.startswith("times/") and r.status == PASSED]
    by_key = {(row["case"], row["dtype"], row["provider"]): row for row in rows}
    copied, predicted = None, {}
    if measured(found):  # a rehearsal's times are to be compared with nothing
        copied, predicted = data(found, "machine/copy bandwidth").get("GB/s"), predictions(found)
    lines = []
    for (case, dtype, provider), row in by_key.items():
        replayed = row.get("graph ms", row["ms"])[0]
        rate = row["bytes"] / replayed / 1e6
        others = [by_key.get((case, "float32", p)) for p in ("reference", "compile")]
        model = predicted.get((case, provider)) if dtype == "float32" else None
        ours = provider in KERNELS
        lines.append([
            case, dtype, PROVIDERS[provider], f"{number(row['ms'][0])} ({number(row['ms'][1])}-{number(row['ms'][2])})",
            number(row["graph ms"][0]) if "graph ms" in row else "-", number(row["host us"]), number(row["MiB"]),
            number(rate) if ours else "-", f"{100 * rate / copied:.0f} %" if ours and copied else "-",
            number(model), number(replayed / model) if model else "-",
            *(f"{number(o['ms'][0] / row['ms'][0])}x" if ours and o else "-" for o in others),
        ])  # fmt: skip
    head = ["case", "dtype", "kernels", "ms (quartiles)", "ms, replayed", "host us", "MiB", "GB/s", "of copy bandwidth",
            "ms, predicted", "measured / predicted", "against eager", "against torch.compile"]  # fmt: skip
    return markdown(head, lines)


def tilings(found: Found) -> str:
    rows = [
        (r.data["case"], row["tiling"], number(row["ms"]), row.get("why", "the table's" if not i else ""))
        for n, r in found.items()
        if n.startswith("tilings/") and r.status == PASSED
        for i, row in enumerate(r.data["rows"])
    ]  # fmt: skip
    return markdown(["case", "tiling", "ms", ""], rows)


def profiles(found: Found) -> str:
    """Of every launch that ncu saw."""
    rows = []
    for backend, kernels in KERNELS.items():
        for launch in data(found, f"ncu/{backend}").get("launches", ()):
            rows.append((kernels, launch["kernel"][:48], *(launch.get(metric, "-") for metric in SHOWN)))
    return markdown(["kernels", "kernel", *SHOWN.values()], rows)


def accuracy(found: Found, most: int = 12) -> str:
    """The results that come nearest to their bounds or are let beyond them, as eager is."""
    rows = [
        (row["error"] / row["bound"], name, key, row)
        for name, record in found.items()
        for key, row in record.data.get("results", {}).items()
        if record.status == PASSED
    ]
    rows.sort(key=lambda row: -row[0])
    shown = [row for row in rows if row[3]["relaxed"]] + [row for row in rows if not row[3]["relaxed"]][:most]
    return markdown(
        ["case", "result", "error", "eager's", "bound", ""],
        ((name, key, f"{row['error']:.1e}", f"{row['eager']:.1e}", f"{row['bound']:.0e}",
          "beyond it, as eager is" if row["relaxed"] else "") for _, name, key, row in shown),
    )  # fmt: skip


def machine(found: Found) -> str:
    """A line or two."""
    names = ("machine/versions", "machine/clocks after work", "machine/copy bandwidth", "machine/matrix products")
    facts = data(found, "machine/versions")
    lines = [f"- {name.removeprefix('machine/')}: {found[name].detail}" for name in names if name in found]
    if facts:
        lines.append(f"- python {facts.get('python')}, nvcc {facts.get('nvcc')}")
    return "\n".join(lines) + ("\n" if lines else "")
