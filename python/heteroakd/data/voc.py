"""Pascal VOC 2012 as it is downloaded (VOCtrainval_11-May-2012.tar): 21 classes, background included, sizes vary.

    root/JPEGImages/*.jpg
    root/SegmentationClass/*.png                         palette PNGs, whose indices are the classes; 255 is ignored
    root/ImageSets/Segmentation/{train,val}.txt          "voc": 1464 and 1449 names

"voc_aug" trains on the 10582 images that VOC and SBD (Hariharan et al.) label together without VOC's val part, with
labels from either of

    root/SegmentationClassAug/*.png                      all labels; with ImageSets/Segmentation/train_aug.txt or
                                                         trainaug.txt, otherwise all that are not in val.txt
    root/benchmark_RELEASE/dataset/cls/*.mat             SBD's own download, benchmark.tgz; needs scipy; images that
                                                         VOC labels too keep VOC's labels

`root` is the folder VOC2012; the one that VOCdevkit or VOC2012 lies in will do.

References: Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015; Hariharan et
al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heteroakd.data.files import (
    DataError,
    FilePair,
    find_files,
    listed_pairs,
    need_folder,
    read_list,
)
from heteroakd.data.reading import FileSource, LabelValues, read_label_values

LABELS = LabelValues(21)
_ARCHIVE = "the contents of VOCtrainval_11-May-2012.tar"
_AUGMENTED_LISTS = ("train_aug.txt", "trainaug.txt")


def voc_source(root: Path, split: str) -> FileSource:
    """One part of VOC 2012 under `root`, by its own lists. Raises DataError for missing folders, lists and files."""
    base = _base(root)
    names_file = _lists(base) / f"{split}.txt"
    return FileSource(_listed(read_list(names_file), names_file, base, base / "SegmentationClass"), LABELS)


def voc_aug_source(root: Path, split: str) -> FileSource:
    """VOC's val part, or the training images of VOC and SBD together. Raises DataError as `voc_source`, and where the
    list of training images holds one of VOC's val part."""
    if split == "val":
        return voc_source(root, split)
    base = _base(root)
    held_out = set(read_list(_lists(base) / "val.txt"))
    augmented = base / "SegmentationClassAug"
    if not augmented.is_dir():
        return FileSource(_with_sbd(root, base, held_out), LABELS, _read_png_or_mat)
    lists = [path for path in (_lists(base) / name for name in _AUGMENTED_LISTS) if path.is_file()]
    if not lists:
        names = [name for name in find_files(augmented, (".png",)) if name not in held_out]
        return FileSource(_listed(names, augmented, base, augmented), LABELS)
    names = read_list(lists[0])
    for name in names:
        if name in held_out:
            raise DataError(f"{lists[0]}: {name!r} belongs to the val part; expected training images only")
    return FileSource(_listed(names, lists[0], base, augmented), LABELS)


def _base(root: Path) -> Path:
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (base / "JPEGImages").is_dir():
            return base
    raise DataError(f"{root / 'JPEGImages'}: no such folder; expected {_ARCHIVE}: root is its folder VOCdevkit/VOC2012")


def _lists(base: Path) -> Path:
    return need_folder(base / "ImageSets" / "Segmentation", _ARCHIVE)


def _listed(names: list[str], names_file: Path, base: Path, labels: Path) -> list[FilePair]:
    def missing(name: str, kind: str) -> str:
        path = base / "JPEGImages" / f"{name}.jpg" if kind == "image" else labels / f"{name}.png"
        return f"{path}: no such file; {names_file} names it"

    images = find_files(base / "JPEGImages", (".jpg",))
    return listed_pairs(names, images, find_files(labels, (".png",)), missing=missing)


def _with_sbd(root: Path, base: Path, held_out: set[str]) -> list[FilePair]:
    places = [folder / "benchmark_RELEASE" / "dataset" / "cls" for folder in (base, root, root.parent)]
    place = next((folder for folder in places if folder.is_dir()), None)
    if place is None:
        raise DataError(
            f"{base / 'SegmentationClassAug'}: no such folder; expected the labels of SBD, as PNGs here or as SBD's "
            f"own download in {places[0]}"
        )
    train_file = _lists(base) / "train.txt"
    own = {
        pair.image.stem: pair for pair in _listed(read_list(train_file), train_file, base, base / "SegmentationClass")
    }
    sbd = find_files(place, (".mat",))
    images = find_files(base / "JPEGImages", (".jpg",))
    added = listed_pairs(
        [name for name in sbd if name not in held_out and name not in own], images, sbd,
        missing=lambda name, kind: f"{base / 'JPEGImages' / name}.jpg: no such file; {sbd[name]} is its label",
    )  # fmt: skip
    return sorted([*own.values(), *added], key=lambda pair: pair.image.stem)


def _read_png_or_mat(path: Path) -> NDArray[Any]:
    return _read_mat(path) if path.suffix == ".mat" else read_label_values(path)


def _read_mat(path: Path) -> NDArray[Any]:
    """The class indices in a label file of SBD."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: SBD's label files are read with scipy: pip install scipy") from None
    try:
        values = np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it was there when the folder was listed") from None
    except Exception as error:  # scipy documents no common kind
        raise DataError(f"{path}: not a label file of SBD ({type(error).__name__}: {error})") from error
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise DataError(f"{path}: expected integers of two dimensions in GTcls.Segmentation, got {values.dtype} "
                        f"{list(values.shape)}")  # fmt: skip
    return values
