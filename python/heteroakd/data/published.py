"""The public data sets as they are downloaded, one declaration each, by the names that `DataConfig.name` takes;
docs/trainer.md has a table of what lies where.

camvid      480x360, 11 classes, void is 11 (Brostow et al., Pattern Recognition Letters 2009; split of Badrinarayanan
            et al., PAMI 2017)
cityscapes  2048x1024; the 34 label ids are read as the 19 train ids (Cordts et al., CVPR 2016)
ade20k      SceneParse150: 0 is unlabelled, others are class + 1; the full ADE20K is another set of files and is
            refused (Zhou et al., CVPR 2017)
coco_stuff  COCO-Stuff-164k: of its 182 classes 11 occur nowhere, and a mean over the classes leaves out those that are
            not predicted either (Caesar et al., CVPR 2018)
voc         21 classes, background included, sizes vary; `root` is the folder VOC2012 or the one that VOCdevkit or
            VOC2012 lies in; parts by its lists, of 1464 and 1449 names (Everingham et al., IJCV 2015)
voc_aug     trains on the 10582 images that VOC and SBD (Hariharan et al., ICCV 2011) label together without VOC's val
            part: by SegmentationClassAug/*.png, those of train_aug.txt or trainaug.txt, without such a list all that
            are not in val.txt; or by SBD's own download, *.mat, which needs scipy, where VOC's own labels go first
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from heteroakd.data.files import DataError, FilePair, find_files, need_folder, pair_files, read_list
from heteroakd.data.folder import Colour, read_classes
from heteroakd.data.reading import FileSource, LabelValues, read_label_values
from heteroakd.data.samples import IGNORE_INDEX

_VOC_LABELS = LabelValues(21)
_ARCHIVE = "the contents of VOCtrainval_11-May-2012.tar"
_AUGMENTED_LISTS = ("train_aug.txt", "trainaug.txt")


def voc_source(root: Path, split: str) -> FileSource:
    """One part of VOC 2012 under `root`, by its own lists. Raises DataError for missing folders, lists and files."""
    base = _base(root)
    names_file = _lists(base) / f"{split}.txt"
    return FileSource(_listed(read_list(names_file), names_file, base, base / "SegmentationClass"), _VOC_LABELS)


def voc_aug_source(root: Path, split: str) -> FileSource:
    """VOC's val part, or the training images of VOC and SBD together. Raises DataError as `voc_source`, and where the
    list of training images holds one of VOC's val part."""
    if split == "val":
        return voc_source(root, split)
    base = _base(root)
    held_out = set(read_list(_lists(base) / "val.txt"))
    augmented = base / "SegmentationClassAug"
    if not augmented.is_dir():
        return FileSource(_with_sbd(root, base, held_out), _VOC_LABELS, _read_png_or_mat)
    lists = [path for path in (_lists(base) / name for name in _AUGMENTED_LISTS) if path.is_file()]
    if not lists:
        names = [name for name in find_files(augmented, (".png",)) if name not in held_out]
        return FileSource(_listed(names, augmented, base, augmented), _VOC_LABELS)
    names = read_list(lists[0])
    for name in names:
        if name in held_out:
            raise DataError(f"{lists[0]}: {name!r} belongs to the val part; expected training images only")
    return FileSource(_listed(names, lists[0], base, augmented), _VOC_LABELS)


def _base(root: Path) -> Path:
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (base / "JPEGImages").is_dir():
            return base
    raise DataError(f"{root / 'JPEGImages'}: no such folder; expected {_ARCHIVE}: root is its folder VOCdevkit/VOC2012")


def _lists(base: Path) -> Path:
    return need_folder(base / "ImageSets" / "Segmentation", _ARCHIVE)


def _listed(names: list[str], names_file: Path, base: Path, labels: Path) -> list[FilePair]:
    images, found = find_files(base / "JPEGImages", (".jpg",)), find_files(labels, (".png",))
    for name in names:
        for files, path in ((images, base / "JPEGImages" / f"{name}.jpg"), (found, labels / f"{name}.png")):
            if name not in files:
                raise DataError(f"{path}: no such file; {names_file} names it")
    return [FilePair(images[name], found[name]) for name in names]


def _with_sbd(root: Path, base: Path, held_out: set[str]) -> list[FilePair]:
    places = [folder / "benchmark_RELEASE" / "dataset" / "cls" for folder in (base, root, root.parent)]
    place = next((folder for folder in places if folder.is_dir()), None)
    if place is None:
        raise DataError(
            f"{base / 'SegmentationClassAug'}: no such folder; expected the labels of SBD, as PNGs here or as SBD's "
            f"own download in {places[0]}"
        )
    pairs = {pair.image.stem: pair for pair in voc_source(root, "train").pairs}
    images = find_files(base / "JPEGImages", (".jpg",))
    for name, label in find_files(place, (".mat",)).items():
        if name not in held_out and name not in pairs:
            if name not in images:
                raise DataError(f"{base / 'JPEGImages' / name}.jpg: no such file; {label} is its label")
            pairs[name] = FilePair(images[name], label)
    return [pairs[name] for name in sorted(pairs)]


def _read_png_or_mat(path: Path) -> NDArray[Any]:
    """The class indices in a label file of VOC or SBD."""
    if path.suffix == ".png":
        return read_label_values(path)
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: SBD's label files are read with scipy: pip install scipy") from None
    try:
        values = np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
    except Exception as error:  # scipy documents no common kind
        raise DataError(f"{path}: not a label file of SBD ({type(error).__name__}: {error})") from error
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise DataError(f"{path}: expected integers of two dimensions in GTcls.Segmentation, got {values.dtype} "
                        f"{list(values.shape)}")  # fmt: skip
    return values


_CLASSES = Path(__file__).parent / "classes"


class Layout(NamedTuple):
    """Where images and labels lie, and how they are paired: by their names without the endings."""

    images: str
    labels: str
    """Folders under the root, their subfolders included; {part} stands for the part's name."""
    values: LabelValues
    origin: tuple[str | None, str | None] = (None, None)
    """Where the contents of both come from, for the error that misses a folder."""
    parts: Mapping[str, str] = {"train": "train", "val": "val", "test": "test"}
    """What the set calls its parts."""
    endings: tuple[str, str] = ("", "")
    skip_label: str | None = None
    """Ending of labels that are not looked at."""
    inside: str | None = None
    """Folder that the root may lie above."""
    foreign: tuple[str, ...] = ()
    """Files of another set that is taken for this one."""
    refusal: str = ""

    def source(self, root: Path, split: str) -> FileSource:
        """One part under `root`. Raises DataError for missing folders, unpaired files and another set's files."""
        if self.inside is not None and (root / self.inside).is_dir():
            root = root / self.inside
        images, labels = (root / place.format(part=self.parts[split]) for place in (self.images, self.labels))
        for name in self.foreign if not labels.parent.is_dir() else ():
            if (root / name).exists():
                raise DataError(f"{root / name}: {self.refusal}")
        for folder, origin in zip((images, labels), self.origin, strict=True):
            if origin is not None:
                need_folder(folder, origin.format(part=self.parts[split]))
        image_ending, label_ending = self.endings
        pairs = pair_files(
            images, labels, image_ending=image_ending, label_ending=label_ending, skip_label=self.skip_label
        )
        return FileSource(pairs, self.values)


# Cityscapes' label ids by train id from 0. The other ids are void, or too rare for the benchmark.
_TRAINED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_TRAIN_IDS = {**dict.fromkeys(range(34), IGNORE_INDEX), **{label: index for index, label in enumerate(_TRAINED_IDS)}}
_ADE20K = "the contents of ADEChallengeData2016.zip"

CAMVID = Layout("{part}", "{part}annot", LabelValues(11, ((11, IGNORE_INDEX),)))
CITYSCAPES = Layout(
    "leftImg8bit/{part}",
    "gtFine/{part}",
    LabelValues(19, tuple(_TRAIN_IDS.items()), "a label id of Cityscapes, 0 to 33"),
    ("the contents of leftImg8bit_trainvaltest.zip", "the contents of gtFine_trainvaltest.zip"),
    endings=("_leftImg8bit", "_gtFine_labelIds"),
)
ADE20K = Layout(
    "images/{part}",
    "annotations/{part}",
    LabelValues(150, ((0, IGNORE_INDEX), *((value, value - 1) for value in range(1, 151))), "0 (unlabelled) to 150"),
    (_ADE20K, _ADE20K),
    {"train": "training", "val": "validation"},
    inside="ADEChallengeData2016",
    foreign=("index_ade20k.mat", "index_ade20k.pkl", "images/ADE", "ADE20K_2016_07_26", "ADE20K_2021_17_01"),
    refusal="this belongs to the full ADE20K, whose *_seg.png hold more than 3000 classes in two colour channels; "
    "expected the benchmark of 150 classes, SceneParse150: ADEChallengeData2016.zip of "
    "http://sceneparsing.csail.mit.edu, with the folders images and annotations",
)
COCO_STUFF = Layout(
    "images/{part}",
    "annotations/{part}",
    LabelValues(182),
    (
        "the contents of {part}.zip",
        "the PNGs of stuffthingmaps_trainval2017.zip (the JSON files of annotations_trainval2017.zip hold no stuff)",
    ),
    {"train": "train2017", "val": "val2017"},
    skip_label="_labelTrainIds",  # mmsegmentation writes its converted labels beside the originals
)


class PublishedSet(NamedTuple):
    """How one public data set is read, and what it should hold."""

    source: Callable[[Path, str], FileSource]
    """Root and part ("train", "val", of CamVid "test") -> pictures."""
    class_list: str
    """File of names and colours in `classes/`."""
    images: Mapping[str, int]
    """Images of each part as published."""

    def classes(self) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
        """Names and colours."""
        return read_classes(_CLASSES / self.class_list)


PUBLISHED: dict[str, PublishedSet] = {
    "camvid": PublishedSet(CAMVID.source, "camvid.txt", {"train": 367, "val": 101, "test": 233}),
    "cityscapes": PublishedSet(CITYSCAPES.source, "cityscapes.txt", {"train": 2975, "val": 500}),
    "voc": PublishedSet(voc_source, "voc.txt", {"train": 1464, "val": 1449}),
    "voc_aug": PublishedSet(voc_aug_source, "voc.txt", {"train": 10582, "val": 1449}),
    "ade20k": PublishedSet(ADE20K.source, "ade20k.txt", {"train": 20210, "val": 2000}),
    "coco_stuff": PublishedSet(COCO_STUFF.source, "coco_stuff.txt", {"train": 118287, "val": 5000}),
}
