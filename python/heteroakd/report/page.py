"""A report as one HTML file that holds its tables, curves and pictures and refers to nothing outside."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from heteroakd.report.figures import Diagram, svg
from heteroakd.report.templates import render
from heteroakd.system.files import write_text

_QUALITY = 80  # of WebP: photographs take a fifth of their PNGs
_LARGEST = 16383  # pixels of a side that WebP has; three photographs beside each other may be wider


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
    picture: Image.Image | Path
    """The picture, or the path of its file."""


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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data_uri(picture: Picture) -> str:
    opened, smaller = picture.picture, io.BytesIO()
    shown = (opened if isinstance(opened, Image.Image) else Image.open(opened)).convert("RGB")
    shown.thumbnail((_LARGEST, _LARGEST))
    shown.save(smaller, format="WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(smaller.getvalue()).decode('ascii')}"


def write_report(
    path: Path, *, title: str, introduction: str, tables: Sequence[Table] = (), sections: Sequence[Section] = ()
) -> None:
    """Write a self-contained HTML file: title, introduction, tables, sections, in this order.

    `introduction` is plain text; empty lines separate its paragraphs. The page follows the reader's light or dark
    scheme. The file appears complete or not at all; folders are made as needed. Raises OSError for a file that cannot
    be read or written.
    """
    filters: dict[str, Any] = {"cell": _cell, "data_uri": _data_uri, "svg": svg}
    page = render("page.html.j2", filters, title=title, introduction=introduction, tables=tables, sections=sections)
    write_text(path, page)
