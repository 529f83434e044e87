"""A data set of one's own, in a folder of this layout:

    root/classes.txt                            one class per line, in the order of the labels from 0
    root/images/train/*   root/labels/train/*   training images and label PNGs of the same stems
    root/images/val/*     root/labels/val/*     validation

Images may be PNG, JPEG, BMP, TIFF or WebP. Labels are single-channel PNGs, grey or palette, whose values are
class indices; 255 is ignored. A line of classes.txt is a name and, if wanted, a colour: `traffic sign
#dcdc00`. Empty lines and lines that begin with `//` are skipped. Classes without a colour get one from a
fixed series.
"""

import colorsys
import re
from pathlib import Path
from typing import Literal

from heteroakd.data.files import DataError, FileSource, LabelValues, pair_files
from heteroakd.data.samples import IGNORE_INDEX

Colour = tuple[int, int, int]

_LINE = re.compile(r"^(?P<name>.*?)(?:\s+#(?P<colour>[0-9a-fA-F]{6}))?$")
_LOOKS_LIKE_A_COLOUR = re.compile(r"(^|\s)#\S*$")


def series_colour(index: int) -> Colour:
    """The index-th of a series of colours: hues by the golden angle, lightness in three levels."""
    hue = (index * 0.61803398875) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.35, 0.7)[index % 3], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours of the classes in a classes.txt.

    Raises DataError, naming file and line, if the file is missing, not UTF-8 text, names no class, more than
    255 or one twice, or has a colour that is not `#rrggbb`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected one class name per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error
    names: list[str] = []
    colours: list[Colour] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("//"):
            continue
        match = _LINE.match(line)
        if match is None or _LOOKS_LIKE_A_COLOUR.search(match["name"]):
            raise DataError(f"{path}, line {number}: expected a class name and optionally #rrggbb, got {line!r}")
        if match["name"] in names:
            raise DataError(f"{path}, line {number}: class {match['name']!r} is named twice")
        colour = match["colour"]
        colours.append(
            series_colour(len(names))
            if colour is None
            else (int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16))
        )
        names.append(match["name"])
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{path}: expected 1 to {IGNORE_INDEX} class names, one per line, got {len(names)}")
    return tuple(names), tuple(colours)


def folder_source(root: Path, split: Literal["train", "val"], num_classes: int) -> FileSource:
    """One part of the data set under `root`. Raises DataError for missing folders and unpaired files."""
    return FileSource(pair_files(root / "images" / split, root / "labels" / split), LabelValues(num_classes))
