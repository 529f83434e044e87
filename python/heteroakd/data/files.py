"""Pairs of image and label files: finding them, reading them, and saying what is wrong with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from heteroakd.data.samples import IGNORE_INDEX

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_LABEL_MODES = ("1", "L", "P", "I", "I;16")
_WRONG = -1


class DataError(ValueError):
    """A data set on disk is not what it should be; the message names the file and what was expected."""


class FilePair(NamedTuple):
    """An image file and the file of its labels."""

    image: Path
    label: Path


def need_folder(folder: Path, origin: str) -> Path:
    """The folder itself. Raises DataError, saying where its contents come from, if it is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {origin}")
    return folder


def find_files(folder: Path, suffixes: Sequence[str], ending: str = "", skip: str | None = None) -> dict[str, Path]:
    """Files of a folder by key, sorted: the name without its suffix, which is one of `suffixes`, and without
    `ending`, which all must have to be found; names that end with `skip` are passed over.

    Raises DataError for a folder that is missing or holds none, and for two files of one key.
    """
    expected = f"{', '.join(ending + suffix for suffix in suffixes)} files"
    need_folder(folder, f"one with {expected}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Dot files are not pictures, whatever their suffix: macOS leaves "._name.png" beside "name.png".
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.stem.endswith(ending):
            continue
        if skip is not None and path.stem.endswith(skip):
            continue
        key = path.stem.removesuffix(ending)
        if key in found:
            raise DataError(f"{path}: same stem as {found[key].name}; expected one file of each stem")
        found[key] = path
    if not found:
        raise DataError(f"{folder}: no picture in it; expected {expected}")
    return found


def pair_files(
    images: Path, labels: Path, *, image_ending: str = "", label_ending: str = "", skip_label: str | None = None
) -> list[FilePair]:
    """Pairs of equal stem from a folder of images (IMAGE_SUFFIXES) and a folder of label PNGs, sorted by stem.

    Stems are compared without `image_ending` and `label_ending`; files without these endings, and labels whose stem
    ends with `skip_label`, are not looked at. Raises DataError for a folder that is missing or empty and for the
    first file without a partner.
    """
    image_files = find_files(images, IMAGE_SUFFIXES, image_ending)
    label_files = find_files(labels, (".png",), label_ending, skip_label)
    for key, path in image_files.items():
        if key not in label_files:
            raise DataError(f"{path}: no label for it; expected {labels / (key + label_ending)}.png")
    for key, path in label_files.items():
        if key not in image_files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{path}: no image for it; expected {images / (key + image_ending)} with one of {suffixes}")
    return [FilePair(path, label_files[key]) for key, path in image_files.items()]


def read_list(path: Path) -> list[str]:
    """The names in a list file, one per line: the stem of each line's first word, "a/b/name.jpg more" or "name".

    Raises DataError for a file that is missing, empty or not text, and for a name that stands in it twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a list of image names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = Path(line.split()[0]).stem
        if name in names:
            raise DataError(f"{path}, line {number}: {name!r} stands in line {names[name]} already")
        names[name] = number
    if not names:
        raise DataError(f"{path}: expected image names, one per line, got none")
    return list(names)


def listed_pairs(
    names: Iterable[str], images: Mapping[str, Path], labels: Mapping[str, Path], *, missing: Callable[[str, str], str]
) -> list[FilePair]:
    """The pairs that `names` lists out of files by name.

    Raises DataError with the text of `missing(name, "image" or "label")` for the first name without a file.
    """
    pairs = []
    for name in names:
        for kind, files in (("image", images), ("label", labels)):
            if name not in files:
                raise DataError(missing(name, kind))
        pairs.append(FilePair(images[name], labels[name]))
    return pairs


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it was there when the folder was listed") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable picture: {error}") from error
    return picture


def read_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB, upright by its EXIF data. Raises DataError if unreadable."""
    picture = ImageOps.exif_transpose(_open(path)).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_label_values(path: Path) -> NDArray[Any]:
    """The integers [H, W] in a grey or palette PNG. Raises DataError for an unreadable file and a colour picture."""
    picture = _open(path)
    if picture.mode not in _LABEL_MODES:
        raise DataError(f"{path}: a label must be a single-channel PNG of class indices, got mode {picture.mode}")
    values = np.asarray(picture)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


@lru_cache(maxsize=16)
def _classes_of_values(num_classes: int, remap: tuple[tuple[int, int], ...]) -> NDArray[np.int16]:
    """The class of each of the values 0 to 255 of a label file, _WRONG where it must not occur."""
    table = np.full(256, _WRONG, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[IGNORE_INDEX] = IGNORE_INDEX
    for value, replacement in remap:
        table[value] = replacement
    return table


class LabelValues(NamedTuple):
    """What the values of a data set's label files mean."""

    num_classes: int
    """K: the values 0 to K-1 are classes where `remap` does not say otherwise, and 255 is ignored."""
    remap: tuple[tuple[int, int], ...] = ()
    """Values 0 to 255 of the file and what they are read as."""
    described: str | None = None
    """The valid values in words, for error messages; by default made from the above."""

    @classmethod
    def of(cls, num_classes: int, remap: Mapping[int, int], described: str | None = None) -> "LabelValues":
        """From a mapping."""
        return cls(num_classes, tuple(remap.items()), described)

    def __str__(self) -> str:
        also = "".join(f", {value} (read as {replacement})" for value, replacement in self.remap)
        return self.described or f"0 to {self.num_classes - 1}{also} or {IGNORE_INDEX} (ignore)"

    def decode(self, values: NDArray[Any], path: Path) -> Tensor:
        """Values [H, W] of the file `path` as uint8 in {0..K-1, 255}. Raises DataError for the first wrong one."""
        table = _classes_of_values(self.num_classes, self.remap)
        outside = (values < 0) | (values > 255) if values.dtype != np.uint8 else None
        classes = table[values if outside is None else np.where(outside, 0, values)]
        wrong = classes == _WRONG if outside is None else (classes == _WRONG) | outside
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(f"{path}: label {values[row, column]} at row {row}, column {column}; expected {self}")
        return torch.from_numpy(classes.astype(np.uint8))


class FileSource:
    """Pictures read from pairs of files: image uint8 [3, H, W], label uint8 [H, W] in {0..K-1, 255}.

    Reading raises DataError for unreadable files, for labels that `labels` does not allow and for labels whose size
    is not their image's. `read_values` reads the integers of a label file that is not a PNG.
    """

    def __init__(
        self,
        pairs: Sequence[FilePair],
        labels: LabelValues,
        read_values: Callable[[Path], NDArray[Any]] = read_label_values,
    ) -> None:
        self.pairs = list(pairs)
        self.labels = labels
        self.read_values = read_values

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = self.labels.decode(self.read_values(pair.label), pair.label)
        if image.shape[1:] != label.shape:
            raise DataError(
                f"{pair.label}: {label.shape[1]}x{label.shape[0]} pixels (width x height);"
                f" expected {image.shape[2]}x{image.shape[1]}, the size of {pair.image}"
            )
        return image, label
