"""Pairs of image and label files: finding them, and saying what is wrong with them."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
"""Of formats that keep every value."""


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


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files with one of `suffixes` in a folder and its subfolders, linked ones too; what begins with a dot is not
    looked at: macOS leaves "._name.png" beside "name.png". Raises DataError for a dead link."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        for name in names if real not in seen else ():
            path = Path(place, name)
            if path.suffix.lower() not in suffixes or name.startswith("."):
                continue
            if path.is_symlink() and not path.exists():
                raise DataError(f"{path}: a dead link, to {os.readlink(path)}; expected a link to a file, or none")
            yield path
        seen.add(real)


def find_files(
    folder: Path, suffixes: Sequence[str], ending: str = "", skip: str | None = None, *, but: Collection[Path] = ()
) -> dict[str, Path]:
    """Files of a folder and its subfolders by key, sorted: the path in it without its suffix, which is one of
    `suffixes`, and without `ending`, which all must have to be found; names that end with `skip`, and the files
    `but`, are passed over. Keys are in Unicode's composed form (NFC), however the file system spells them.

    Raises DataError for a folder that is missing or holds none, for a dead link and for two files of one key.
    """
    expected = f"{', '.join(ending + suffix for suffix in suffixes)} files"
    need_folder(folder, f"one with {expected}")
    found: dict[str, Path] = {}
    for path in sorted(files_below(folder, suffixes)):
        if not path.stem.endswith(ending) or (skip is not None and path.stem.endswith(skip)) or path in but:
            continue
        key = key_of(path.relative_to(folder)).removesuffix(ending)
        if key in found:
            raise DataError(f"{path}: same stem as {found[key].name}; expected one file of each stem")
        found[key] = path
    if not found:
        raise DataError(f"{folder}: no picture in it; expected {expected}")
    return found


def key_of(path: Path) -> str:
    """A path without its suffix, in Unicode's composed form."""
    return normalize("NFC", path.with_suffix("").as_posix())


def pair_files(
    images: Path,
    labels: Path,
    *,
    image_ending: str = "",
    label_ending: str = "",
    skip_label: str | None = None,
    label_suffixes: Sequence[str] = (".png",),
) -> list[FilePair]:
    """Pairs of equal key from a folder of images (IMAGE_SUFFIXES) and a folder of labels, which may be the same, as
    `find_files` finds them, sorted. Raises DataError as it does and for the first file without a partner."""
    both = set(find_files(labels, label_suffixes, label_ending).values()) if images == labels else ()
    image_files = find_files(images, IMAGE_SUFFIXES, image_ending, but=both)
    label_files = find_files(labels, label_suffixes, label_ending, skip_label)
    pairs = with_labels(image_files, label_files, labels, f"{label_ending}{' or '.join(label_suffixes)}")
    for key, path in label_files.items():
        if key not in image_files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{path}: no image for it; expected {images / (key + image_ending)} with one of {suffixes}")
    return pairs


def with_labels(images: Mapping[str, Path], labels: Mapping[str, Path], folder: Path, ending: str) -> list[FilePair]:
    """Images and their labels of equal key. Raises DataError for the first image without one, saying that it should be
    in the folder, with what follows the key."""
    for key, path in images.items():
        if key not in labels:
            raise DataError(f"{path}: no label for it; expected {folder / key}{ending}")
    return [FilePair(path, labels[key]) for key, path in images.items()]


def read_lines(path: Path, expected: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, stripped, by number from 1.

    Raises DataError, saying what was expected, where it is missing or not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_list(path: Path, name_of: Callable[[str], str] = lambda line: Path(line.split()[0]).stem) -> list[str]:
    """The names in a list file, one per line: what `name_of` makes of it, the stem of its first word ("a/b/name.jpg
    more" or "name").

    Raises DataError for a file that is missing, empty or not text, and for a name that stands in it twice.
    """
    names: dict[str, int] = {}
    for number, line in read_lines(path, "a list of image names"):
        name = normalize("NFC", name_of(line))
        if name in names:
            raise DataError(f"{path}, line {number}: {name!r} stands in line {names[name]} already")
        names[name] = number
    if not names:
        raise DataError(f"{path}: expected image names, one per line, got none")
    return list(names)
