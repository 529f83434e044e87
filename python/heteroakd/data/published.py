"""The public data sets as they are downloaded, one declaration each, by the names that `DataConfig.name` takes.

camvid      root/{train,val,test}/*.png, root/{train,val,test}annot/*.png: 480x360, 11 classes, void is 11
            (Brostow et al., Pattern Recognition Letters 2009; split of Badrinarayanan et al., PAMI 2017)
cityscapes  leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, a folder per city: 2048x1024; the 34 label
            ids are read as the 19 train ids (Cordts et al., CVPR 2016)
ade20k      ADEChallengeData2016.zip, SceneParse150: 0 is unlabelled, others are class + 1; the full ADE20K is
            set of files and is refused (Zhou et al., CVPR 2017)
coco_stuff  COCO-Stuff-164k: train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip; of its 182 classes 11 occur
            nowhere, and a mean over the classes leaves out those that are not predicted either (Caesar et al., CVPR
            2018)
voc         see `voc`; voc_aug with the labels of SBD
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from heteroakd.data.files import DataError, need_folder, pair_files
from heteroakd.data.folder import Colour, read_classes
from heteroakd.data.reading import FileSource, LabelValues
from heteroakd.data.samples import IGNORE_INDEX
from heteroakd.data.voc import voc_aug_source, voc_source

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

CAMVID = Layout("{part}", "{part}annot", LabelValues.of(11, {11: IGNORE_INDEX}))
CITYSCAPES = Layout(
    "leftImg8bit/{part}",
    "gtFine/{part}",
    LabelValues.of(19, _TRAIN_IDS, "a label id of Cityscapes, 0 to 33"),
    ("the contents of leftImg8bit_trainvaltest.zip", "the contents of gtFine_trainvaltest.zip"),
    endings=("_leftImg8bit", "_gtFine_labelIds"),
)
ADE20K = Layout(
    "images/{part}",
    "annotations/{part}",
    LabelValues.of(150, {0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 151)}, "0 (unlabelled) to 150"),
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
