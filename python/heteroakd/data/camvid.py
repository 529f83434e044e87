"""CamVid in its common layout: 480x360 pictures of 11 classes, void included as label 11.

    root/train/*.png  root/trainannot/*.png     training images and labels of the same names
    root/val/*.png    root/valannot/*.png       validation
    root/test/*.png   root/testannot/*.png      test; optional, evaluation_part="test"

Reference: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", Pattern Recognition Letters 2009;
split and classes: Badrinarayanan, Kendall, Cipolla, "SegNet", PAMI 2017.
"""

from pathlib import Path
from typing import Literal

from heteroakd.data.files import FileSource, pair_files
from heteroakd.data.samples import IGNORE_INDEX

CLASSES: tuple[str, ...] = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
_VOID = 11


def camvid_source(root: Path, split: Literal["train", "val", "test"]) -> FileSource:
    """One part of CamVid under `root`, void read as 255; DataError for missing folders and unpaired files."""
    pairs = pair_files(root / split, root / f"{split}annot")
    return FileSource(pairs, len(CLASSES), remap={_VOID: IGNORE_INDEX})
