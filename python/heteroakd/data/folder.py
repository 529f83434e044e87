"""A data set of one's own, in a folder of this layout, which options of `DataConfig` change:

    root/classes.txt                            one class per line, in the order of the labels from 0
    root/images/train/*   root/labels/train/*   training images and label pictures of the same names
    root/images/val/*     root/labels/val/*     validation; perhaps test

Images may be PNG, JPEG, BMP, TIFF or WebP, labels PNG, BMP, GIF or TIFF: gray or palette pictures of class indices, of
which 255 is ignored, or pictures in the colours of classes.txt. A line of that is a name and, if wanted, a colour:
`traffic sign #dcdc00`. Empty lines and those that begin with `//` or `# ` are skipped. Classes without a colour get one
from a fixed series.
"""

import colorsys
import os
import re
from functools import partial
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from heteroakd.config.groups import DataConfig
from heteroakd.data import files
from heteroakd.data.files import DataError, FilePair
from heteroakd.data.reading import FileSource, LabelValues, read_label_values
from heteroakd.data.samples import IGNORE_INDEX

Colour = tuple[int, int, int]
Part = Literal["train", "val", "test"]

PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""What the folders of a part may be called."""

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
    names: list[str] = []
    colours: list[Colour] = []
    for number, line in files.read_lines(path, "one class name per line"):
        if line.startswith(("//", "# ")) or line == "#":
            continue
        match = _LINE.match(line)
        if match is None or _LOOKS_LIKE_A_COLOUR.search(match["name"]):
            raise DataError(f"{path}, line {number}: expected a class name and optionally #rrggbb, got {line!r}")
        name, colour = normalize("NFC", match["name"]), match["colour"]
        if name in names:
            raise DataError(f"{path}, line {number}: class {name!r} is named twice")
        red, green, blue = bytes.fromhex(colour) if colour else series_colour(len(names))
        colours.append((red, green, blue))
        names.append(name)
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{path}: expected 1 to {IGNORE_INDEX} class names, one per line, got {len(names)}")
    return tuple(names), tuple(colours)


def label_values(config: DataConfig, colours: tuple[Colour, ...]) -> LabelValues:
    """What the labels' values and colours mean: by `config.label_values`, else as indices and in the classes' own
    colours. Raises ValueError for an index that no class has."""
    own = {
        red << 16 | green << 8 | blue: index
        for index, (red, green, blue) in enumerate(colours)
        if colours[index] != series_colour(index) and colours.count(colours[index]) == 1  # else it says nothing
    }
    given = {str(value): index for value, index in (config.label_values or {}).items()}
    for value, index in given.items():
        if not 0 <= index < len(colours) and index != IGNORE_INDEX:
            raise ValueError(
                f"label_values must map to 0 to {len(colours) - 1} or {IGNORE_INDEX} (ignore), got {index} for {value}"
            )
    default = LabelValues(len(colours))
    other = given.pop("other", default.other)
    by_colour = {int(key[1:], 16): index for key, index in given.items() if key.startswith("#")}
    colour_map = tuple((own | by_colour).items())
    if not given or by_colour:
        return default._replace(colours=colour_map, other=other)
    remap = tuple((int(key), index) for key, index in given.items())
    described = ", ".join(f"{value} (read as {index})" for value, index in ((IGNORE_INDEX, IGNORE_INDEX), *remap))
    return LabelValues(0, remap, described, colour_map, other)


def folder_source(config: DataConfig, part: Part, colours: tuple[Colour, ...]) -> FileSource:
    """One part of the data set under `config.root`. Raises DataError for missing folders and lists and for unpaired
    files, ValueError as `label_values`."""
    root, listed = Path(config.root or ""), config.lists.get(part)
    images, labels = (_place(root, place, part, listed) for place in (config.image_folder, config.label_folder))
    suffix = next((each for each in files.LABEL_SUFFIXES if config.label_suffix.lower().endswith(each)), "")
    ending = config.label_suffix[: len(config.label_suffix) - len(suffix)]
    suffixes = (suffix,) if suffix else files.LABEL_SUFFIXES
    if listed is None:
        pairs = files.pair_files(images, labels, label_ending=ending, label_suffixes=suffixes)
    else:
        pairs = _listed_pairs(root, root / listed, images, labels, ending, suffixes)
    meanings = label_values(config, colours)
    every_picture = any(str(value).startswith("#") for value in config.label_values or {})
    classes = {} if config.label_values else dict(meanings.colours)
    return FileSource(pairs, meanings, partial(read_label_values, colours=every_picture, classes=classes))


def _place(root: Path, place: str, part: str, listed: str | None) -> Path:
    """The folder of a part's images or labels; where the part has a list, perhaps that of all parts."""
    names = [place.replace("{part}", name) for name in PART_NAMES[part]]
    names += [place.replace("{part}", "")] if listed is not None else []
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def _listed_pairs(
    root: Path, list_file: Path, images: Path, labels: Path, ending: str, suffixes: tuple[str, ...]
) -> list[FilePair]:
    """The pairs that a list names, a line each: an image and its label as paths in the root, or an image alone, as a
    path in the root or in the folder of the images, or by its name, with or without its suffix."""
    both: dict[str, FilePair] = {}
    lines = files.read_list(list_file, lambda line: line)
    for line in lines:
        words = line.split("\t") if "\t" in line else line.split()
        if len(words) == 2 and all((root / word).is_file() for word in words):
            both[line] = FilePair(root / words[0], root / words[1])
    if len(both) == len(lines):
        return list(both.values())
    label_files = files.find_files(labels, suffixes, ending)
    # Both may share a folder.
    image_files = files.find_files(images, files.IMAGE_SUFFIXES, but=set(label_files.values()))
    names: dict[str, str | None] = {}  # None: of several files
    for key, path in image_files.items():
        for name in {key, key.rpartition("/")[2], files.key_of(Path(os.path.relpath(path, root)))}:
            names[name] = None if name in names else key
    keys: list[str] = []
    for line in lines:
        name = files.key_of(Path(line)) if Path(line).suffix.lower() in files.IMAGE_SUFFIXES else line
        chosen = names.get(name.removeprefix("./"))
        if chosen is None:
            several = "several files of this name" if name in names else "no such image"
            expected = f"expected one, or an image and its label in {root}"
            raise DataError(f"{list_file}: {line!r}: {several} in {images}; {expected}")
        keys.append(chosen)
    chosen_files = {key: image_files[key] for key in keys}
    return files.with_labels(chosen_files, label_files, labels, f"{ending}{' or '.join(suffixes)}")
