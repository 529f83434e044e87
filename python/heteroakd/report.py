"""A run's report: one HTML file that holds its tables, curves and pictures and refers to nothing outside."""

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from heteroakd.checkpoint import atomic_file

# After Okabe and Ito: distinguishable by colour-blind readers; mid tones that hold on white and on
# near-black.
_COLOURS = ("#2b8ccf", "#d55e00", "#009e73", "#cc79a7", "#56c5e9", "#e69f00", "#8c7ae6", "#999999")
_LINES = ("-", "--", "-.", ":")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2126; --faint: #66707a; --line: #d9dee3; --card: #f6f8fa; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e4e8ec; --faint: #98a2ad; --line: #333a41; --card: #1c2024; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 {
  font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; padding-bottom: .8rem;
  border-bottom: 3px solid var(--accent);
}
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
p { max-width: 46rem; margin: 0 0 .8rem; }
.note { color: var(--faint); font-size: .9rem; margin-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 600; font-size: .88rem; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--card); }
.curves { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure {
  margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { border-radius: 4px; }
figcaption { font-size: .95rem; margin-bottom: .6rem; font-weight: 600; }
.pictures figure { margin-bottom: 1.2rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Table:
    """A table with its title; cells are shown as they are, floats with four significant digits."""

    title: str
    columns: Sequence[str]
    """Headings; the first column is aligned left, the others right."""
    rows: Sequence[Sequence[object]]
    """Cells, as many in each row as there are columns; None and NaN become a dash."""
    note: str = ""
    """A remark below the table."""


@dataclass(frozen=True)
class Curve:
    """A diagram of one or more series of points."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Points (x, y) by name; points that are not finite leave a gap."""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption."""

    caption: str
    png: bytes | str | Path
    """The PNG itself, or the path of its file."""


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _table(table: Table) -> str:
    for number, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r}: row {number} has {len(row)} cells,"
                f" expected {len(table.columns)}, one per column"
            )
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _svg(curve: Curve) -> str:
    """The diagram as an SVG element whose text and axes take the page's colour."""
    ink = "#123456"  # a stand-in that is replaced by currentColor below; no series has this colour
    figure = Figure(figsize=(6.0, 3.7), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curve.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        style = _LINES[number // len(_COLOURS) % len(_LINES)]
        finite = [(x, y) if math.isfinite(x) and math.isfinite(y) else (math.nan, math.nan) for x, y in points]
        marker = "o" if len(points) <= 30 else ""
        axes.plot(
            [x for x, _ in finite], [y for _, y in finite], style, color=colour, label=name, linewidth=1.8,
            marker=marker, markersize=3.5,
        )  # fmt: skip
    axes.set_xlabel(curve.x_label, color=ink)
    axes.set_ylabel(curve.y_label, color=ink)
    axes.tick_params(colors=ink)
    axes.grid(color=ink, alpha=0.15)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)
    if curve.series:
        axes.legend(frameon=False, labelcolor=ink)
    buffer = io.StringIO()
    # No metadata: its date would make equal reports differ, and its addresses are references to the outside.
    metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    # The salt makes the names of clip paths and markers, random otherwise, a function of the diagram.
    with matplotlib.rc_context({"svg.hashsalt": curve.title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])  # an HTML page needs no name spaces
    return text.replace(ink, "currentColor")


def _curve(curve: Curve) -> str:
    title = html.escape(curve.title)
    svg = _svg(curve).replace("<svg", f'<svg role="img" aria-label="{html.escape(curve.title, quote=True)}"', 1)
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def _picture(picture: Picture) -> str:
    data = picture.png if isinstance(picture.png, bytes) else Path(picture.png).read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        where = "its bytes" if isinstance(picture.png, bytes) else picture.png
        raise ValueError(f"picture {picture.caption!r}: {where}: expected a PNG")
    caption = html.escape(picture.caption)
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<img alt="{html.escape(picture.caption, quote=True)}"'
        f' src="data:image/png;base64,{encoded}"></figure>'
    )


def write_report(
    path: str | Path,
    *,
    title: str,
    introduction: str,
    tables: Sequence[Table] = (),
    curves: Sequence[Curve] = (),
    pictures: Sequence[Picture] = (),
) -> None:
    """Write a self-contained HTML file: title, introduction, tables, curves, pictures, in this order.

    `introduction` is plain text; empty lines separate its paragraphs. The page follows the reader's light or
    dark scheme. The file appears complete or not at all; folders are made as needed. Raises ValueError for a
    table with a row of the wrong length and for a picture that is no PNG, OSError for a file that cannot be
    read or written.
    """
    paragraphs = [paragraph.strip() for paragraph in introduction.split("\n\n") if paragraph.strip()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs),
    ]
    parts += [_table(table) for table in tables]
    if curves:
        drawn = "\n".join(_curve(curve) for curve in curves)
        parts.append(f'<section><h2>Curves</h2>\n<div class="curves">{drawn}</div></section>')
    if pictures:
        shown = "\n".join(_picture(picture) for picture in pictures)
        parts.append(f'<section class="pictures"><h2>Pictures</h2>\n{shown}</section>')
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    with atomic_file(Path(path)) as file:
        file.write(page.encode())
