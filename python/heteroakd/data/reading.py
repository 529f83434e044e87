"""Pictures as they lie on disk: the one reader of all commands, and what the values of label files mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from heteroakd.data.files import DataError, FilePair
from heteroakd.data.samples import IGNORE_INDEX, CachedSource, Source

ORIENTATION = 0x0112  # EXIF's, and TIFF's own
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX")
_WRONG = -1


def _open(path: Path) -> Image.Image:
    """A picture, upright by its EXIF data. Raises DataError, naming the file, for whatever Pillow raises."""
    try:
        with Image.open(path) as picture:
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
    except FileNotFoundError:
        why = "a link to what is not there" if path.is_symlink() else "it was there when the folder was listed"
        raise DataError(f"{path}: no such file; {why}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError and more
        raise DataError(f"{path}: not a readable picture: {str(error) or type(error).__name__}") from error
    return picture


def orientation(path: Path) -> int:
    """How a picture is turned by its EXIF data, 1 where it is not; also where there is no such picture."""
    try:
        with Image.open(path) as picture:
            return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # whoever reads the picture says what is wrong with it
        return 1


def read_image(path: Path) -> Tensor:
    """An image file as RGB [3, H, W], upright by its EXIF data, without its transparency: uint8, or, of gray with 16
    bits, float32 in [0, 1], its values divided by 65535.

    Raises DataError, naming the file, where it is unreadable or its pixels' range is not known (floats, 32 bits).
    """
    picture = _open(path)
    try:
        gray = _gray_of_16_bits(picture)
        if gray is not None:
            return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    except ValueError as error:
        raise DataError(f"{path}: not a readable picture: {error}") from error


def _gray_of_16_bits(picture: Image.Image) -> NDArray[np.float32] | None:
    """Gray [H, W] in [0, 1] of a picture with more than 8 bits; None for one of 8."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):  # these have 16 at most
        kind = "floating-point" if picture.mode == "F" else "32 bit or signed"
        raise ValueError(f"{kind} pixels, whose range is not known; expected 8 bits, or gray of 16")
    if not picture.mode.startswith("I"):
        return None
    tags = getattr(picture, "tag_v2", {})
    largest = 2 ** min(16, int(tags.get(_BITS, (16,))[0])) - 1
    gray = np.asarray(picture).astype(np.float32) / largest
    return 1 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray


def read_label_values(
    path: Path, *, colours: bool = False, classes: Mapping[int, int] = MappingProxyType({})
) -> NDArray[Any]:
    """The integers [H, W] in a gray or palette picture, or the colours uint8 [H, W, 3] of a picture in RGB, with
    `colours` of every picture.

    Raises DataError for an unreadable file, for pictures of other kinds, and for a palette that shows indices in the
    colours (0xrrggbb) that are given of other `classes`: what saved it has numbered the colours anew.
    """
    picture = _open(path)
    if picture.mode in _COLOUR_MODES or (colours and picture.mode in ("1", "L", "P")):
        return np.asarray(picture.convert("RGB"))
    if picture.mode == "P" and classes:
        _check_palette(picture, path, classes)
    if picture.mode == "LA":
        picture = picture.getchannel("L")
    if picture.mode not in _INDEX_MODES:
        raise DataError(f"{path}: a label must be a single-channel picture of class indices, got mode {picture.mode}")
    values = np.asarray(picture)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _check_palette(picture: Image.Image, path: Path, classes: Mapping[int, int]) -> None:
    palette = picture.getpalette("RGB") or []
    used = [index for index, count in enumerate(picture.histogram()) if count and index != IGNORE_INDEX]
    colours = [int.from_bytes(bytes(palette[3 * index : 3 * index + 3]), "big") for index in used]
    whole = len(used) > 1 and 3 * used[-1] + 3 <= len(palette)
    if not whole or len({*colours}) < len(used) or not classes.keys() >= {*colours}:
        return  # a palette that is none of the classes' says nothing of them
    for index, colour in zip(used, colours, strict=True):
        if classes[colour] != index:
            raise DataError(
                f"{path}: index {index} has the colour #{colour:06x} of class {classes[colour]} in the picture's "
                "palette; expected classes as indices: save labels in colours as RGB, or name them in data.label_values"
            )


@lru_cache(maxsize=4)
def _table(size: int, meaning: tuple[tuple[int, int], ...], other: int) -> NDArray[np.int16]:
    """The class of each of the values 0 to size - 1, `other` where nothing is said of it."""
    table = np.full(size, other, np.int16)
    for value, replacement in meaning:
        table[value] = replacement
    return table


class LabelValues(NamedTuple):
    """What the values of a data set's label files mean."""

    num_classes: int
    """K: the values 0 to K-1 are classes where `remap` does not say otherwise, and 255 is ignored."""
    remap: tuple[tuple[int, int], ...] = ()
    """Values 0 to 65535 of the file and what they are read as."""
    described: str | None = None
    """The valid values in words, for error messages; by default made from the above."""
    colours: tuple[tuple[int, int], ...] = ()
    """Of labels in RGB: colours as 0xrrggbb and what they are read as."""
    other: int = _WRONG
    """What all other values and colours are read as."""

    def __str__(self) -> str:
        also = "".join(f", {value} (read as {replacement})" for value, replacement in self.remap)
        return self.described or f"0 to {self.num_classes - 1}{also} or {IGNORE_INDEX} (ignore)"

    def decode(self, values: NDArray[Any], path: Path) -> Tensor:
        """Values [H, W], or colours [H, W, 3], of the file `path` as uint8 [H, W] in {0..K-1, 255}. Raises DataError
        for the first wrong one."""
        expected, shown = str(self), "{}".format
        meaning, size = self.colours, 1 << 24
        if values.ndim == 3:
            if not self.colours:
                raise DataError(
                    f"{path}: a label must be a single-channel PNG of class indices, got mode RGB; colours are read as "
                    "classes.txt (road #804080) or data.label_values ({'#804080': 0}) says"
                )
            red, green, blue = np.moveaxis(values.astype(np.int32), 2, 0)
            values, shown = red << 16 | green << 8 | blue, "#{:06x}".format
            expected = ", ".join(f"#{colour:06x} ({index})" for colour, index in self.colours)
        else:
            own = ((value, value) for value in (*range(self.num_classes), IGNORE_INDEX))
            meaning, size = (*own, *self.remap), 1 + max([255, *(value for value, _ in self.remap)])
        outside = (values < 0) | (values >= size) if values.dtype != np.uint8 else None
        table = _table(size, meaning, self.other)
        classes = table[values if outside is None else np.where(outside, 0, values)]
        if outside is not None:
            classes[outside] = self.other
        wrong = classes == _WRONG
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(f"{path}: label {shown(values[row, column])} at row {row}, column {column}; "
                            f"expected {expected}")  # fmt: skip
        return torch.from_numpy(classes.astype(np.uint8))


@dataclass(eq=False)
class FileSource:
    """Pictures read from pairs of files: images as `read_image` has them, label uint8 [H, W] in {0..K-1, 255}.

    Reading raises DataError for unreadable files, for labels that `labels` does not allow and for labels whose size
    is not their image's.
    """

    pairs: Sequence[FilePair]
    labels: LabelValues
    read_values: Callable[[Path], NDArray[Any]] = read_label_values
    """Reads the values of a label file."""

    def __len__(self) -> int:
        return len(self.pairs)

    def label(self, index: int) -> Tensor:
        """The label alone."""
        path = self.pairs[index].label
        return self.labels.decode(self.read_values(path), path)

    def turned(self, index: int) -> bool:
        """Whether the image's EXIF data turn it and those of its label do not, or otherwise."""
        return len({orientation(path) for path in self.pairs[index]}) > 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image, label = read_image(pair.image), self.label(index)
        if image.shape[1:] != label.shape:
            turned = "; its EXIF data turn the image and not the label" if self.turned(index) else ""
            raise DataError(
                f"{pair.label}: {label.shape[1]}x{label.shape[0]} pixels (width x height);"
                f" expected {image.shape[2]}x{image.shape[1]}, the size of {pair.image}{turned}"
            )
        return image, label


def files_of(source: Source) -> FileSource | None:
    """The files that a source reads, kept in memory or not; None where it reads none."""
    source = source.source if isinstance(source, CachedSource) else source
    return source if isinstance(source, FileSource) else None
