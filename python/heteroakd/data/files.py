"""Pairs of image and label files: finding them, reading them, and saying what is wrong with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from heteroakd.data.samples import IGNORE_INDEX

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_LABEL_MODES = ("1", "L", "P", "I", "I;16")


class DataError(ValueError):
    """A data set on disk is not what it should be; the message names the file and what was expected."""


class FilePair(NamedTuple):
    """An image file and the file of its labels."""

    image: Path
    label: Path


def _stems(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with {', '.join(suffixes)} files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Dot files are not pictures, whatever their suffix: macOS leaves "._name.png" beside "name.png".
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(f"{path}: same stem as {found[path.stem].name}; expected one file of each stem")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder}: no picture in it; expected {', '.join(suffixes)} files")
    return found


def pair_files(images: Path, labels: Path) -> list[FilePair]:
    """Pairs of equal stem from a folder of images (IMAGE_SUFFIXES) and a folder of label PNGs, sorted by
    stem.

    Raises DataError for a folder that is missing or empty and for the first file without a partner.
    """
    image_files = _stems(images, IMAGE_SUFFIXES)
    label_files = _stems(labels, (".png",))
    for stem, path in image_files.items():
        if stem not in label_files:
            raise DataError(f"{path}: no label for it; expected {labels / stem}.png")
    for stem, path in label_files.items():
        if stem not in image_files:
            raise DataError(
                f"{path}: no image for it; expected {images / stem} with one of {', '.join(IMAGE_SUFFIXES)}"
            )
    return [FilePair(path, label_files[stem]) for stem, path in image_files.items()]


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


def read_label(path: Path, num_classes: int, remap: Mapping[int, int] | None = None) -> Tensor:
    """A PNG of class indices, grey or palette, as uint8 [H, W] in {0..num_classes-1, 255}.

    `remap` replaces values of the file, e.g. `{11: 255}`, and the replaced values are valid ones. Raises
    DataError for an unreadable file, for a colour picture and for the first value out of range.
    """
    picture = _open(path)
    if picture.mode not in _LABEL_MODES:
        raise DataError(f"{path}: a label must be a single-channel PNG of class indices, got mode {picture.mode}")
    values = np.asarray(picture).astype(np.int64)
    for value, replacement in (remap or {}).items():
        values[values == value] = replacement
    wrong = ((values < 0) | (values >= num_classes)) & (values != IGNORE_INDEX)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        also = "".join(f", {value} (read as {replacement})" for value, replacement in (remap or {}).items())
        raise DataError(
            f"{path}: label {values[row, column]} at row {row}, column {column};"
            f" expected 0 to {num_classes - 1}{also} or {IGNORE_INDEX} (ignore)"
        )
    return torch.from_numpy(values.astype(np.uint8))


class FileSource:
    """Pictures read from pairs of files: image uint8 [3, H, W], label uint8 [H, W] in {0..K-1, 255}.

    Reading raises DataError for files that `read_image` or `read_label` refuse and for labels whose size is
    not their image's.
    """

    def __init__(self, pairs: Sequence[FilePair], num_classes: int, remap: Mapping[int, int] | None = None) -> None:
        self.pairs = list(pairs)
        self.num_classes = num_classes
        self.remap = dict(remap or {})

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = read_label(pair.label, self.num_classes, self.remap)
        if image.shape[1:] != label.shape:
            raise DataError(
                f"{pair.label}: {label.shape[1]}x{label.shape[0]} pixels (width x height);"
                f" expected {image.shape[2]}x{image.shape[1]}, the size of {pair.image}"
            )
        return image, label
