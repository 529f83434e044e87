"""A run's report: one HTML file that holds its tables, curves and pictures and refers to nothing outside."""

import base64
import html
import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from heteroakd.report.figures import Bars, Curve, Diagram, Matrix, svg
from heteroakd.training.checkpoint import atomic_file

__all__ = ["Bars", "Curve", "Matrix", "Picture", "Section", "Table", "write_figures", "write_report"]


_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
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
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { max-width: 46rem; margin: 0 0 .8rem; }
.note { color: var(--faint); font-size: .9rem; margin-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 600; font-size: .88rem; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--card); }
.curves { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  align-items: start; }
figure {
  margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { border-radius: 4px; }
figcaption { font-size: .95rem; margin-bottom: .6rem; font-weight: 600; }
.curves figure { max-width: 46rem; }
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
class Picture:
    """A picture with its caption."""

    caption: str
    png: bytes | str | Path
    """The PNG itself, or the path of its file."""


@dataclass(frozen=True)
class Section:
    """A heading with diagrams, tables and pictures below it, in this order."""

    title: str
    text: str = ""
    """Plain text below the heading; empty lines separate paragraphs."""
    diagrams: Sequence[Diagram] = ()
    tables: Sequence[Table] = ()
    """Their titles stand above them, smaller than the section's."""
    pictures: Sequence[Picture] = ()


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _table(table: Table, heading: str = "h2") -> str:
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
        f"<section><{heading}>{html.escape(table.title)}</{heading}>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _diagram(diagram: Diagram) -> str:
    return f"<figure><figcaption>{html.escape(diagram.title)}</figcaption>{svg(diagram)}</figure>"


def _png(picture: Picture) -> bytes:
    data = picture.png if isinstance(picture.png, bytes) else Path(picture.png).read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        where = "its bytes" if isinstance(picture.png, bytes) else picture.png
        raise ValueError(f"picture {picture.caption!r}: {where}: expected a PNG")
    return data


def _picture(picture: Picture) -> str:
    data = _png(picture)
    caption = html.escape(picture.caption)
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<img alt="{html.escape(picture.caption, quote=True)}"'
        f' src="data:image/png;base64,{encoded}"></figure>'
    )


def _paragraphs(text: str) -> list[str]:
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    return [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs if paragraph]


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>", *_paragraphs(section.text)]
    if section.diagrams:
        drawn = "\n".join(map(_diagram, section.diagrams))
        parts.append(f'<div class="curves">{drawn}</div>')
    parts += [_table(table, "h3") for table in section.tables]
    if section.pictures:
        shown = "\n".join(map(_picture, section.pictures))
        parts.append(f'<div class="pictures">{shown}</div>')
    return "\n".join(parts) + "</section>"


def write_figures(folder: str | Path, sections: Sequence[Section]) -> list[Path]:
    """Write the sections' diagrams as SVG files and their pictures as PNGs, named by their titles; returns the paths.

    Text and axes are gray, for light and dark pages. Files of the same name are replaced. Raises as `write_report`.
    """
    files: dict[str, bytes] = {}
    for section in sections:
        for diagram in section.diagrams:
            files[_free_name(diagram.title, ".svg", files)] = _standalone(svg(diagram)).encode()
        for picture in section.pictures:
            files[_free_name(picture.caption, ".png", files)] = _png(picture)
    paths = [Path(folder) / name for name in files]
    for path, contents in zip(paths, files.values(), strict=True):
        with atomic_file(path) as file:
            file.write(contents)
    return paths


def _standalone(element: str) -> str:
    """An SVG element of a page as a file of its own."""
    spaces = f'xmlns="{_SVG}" xmlns:xlink="{_XLINK}" color="#808080"'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{element.replace("<svg", f"<svg {spaces}", 1)}'


def _free_name(title: str, suffix: str, taken: Container[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "figure"
    names = (f"{stem}{'' if number == 1 else f'-{number}'}{suffix}" for number in count(1))
    return next(name for name in names if name not in taken)


def write_report(
    path: str | Path,
    *,
    title: str,
    introduction: str,
    tables: Sequence[Table] = (),
    curves: Sequence[Diagram] = (),
    pictures: Sequence[Picture] = (),
    sections: Sequence[Section] = (),
) -> None:
    """Write a self-contained HTML file: title, introduction, tables, curves, pictures, sections, in this order.

    `introduction` is plain text; empty lines separate its paragraphs. The page follows the reader's light or
    dark scheme. The file appears complete or not at all; folders are made as needed. Raises ValueError for a
    table or diagram of the wrong length and for a picture that is no PNG, OSError for a file that cannot be
    read or written.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *_paragraphs(introduction)]
    parts += [_table(table) for table in tables]
    if curves:
        parts.append(_section(Section("Curves", diagrams=curves)))
    if pictures:
        parts.append(_section(Section("Pictures", pictures=pictures)))
    parts += [_section(section) for section in sections]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    with atomic_file(Path(path)) as file:
        file.write(page.encode())
