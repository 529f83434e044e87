"""CamVid in its common layout: 480x360 pictures of 11 classes, void included as label 11.

    root/train/*.png  root/trainannot/*.png     training images and labels of the same names
    root/val/*.png    root/valannot/*.png       validation
    root/test/*.png   root/testannot/*.png      test; optional, evaluation_part="test"

Reference: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", Pattern Recognition Letters 2009;
split and classes: Badrinarayanan, Kendall, Cipolla, "SegNet", PAMI 2017.
"""

from pathlib import Path
from typing import Literal

from heteroakd.data.files import FileSource, LabelValues, pair_files
from heteroakd.data.samples import IGNORE_INDEX

LABELS = LabelValues.of(11, {11: IGNORE_INDEX})


def camvid_source(root: Path, split: Literal["train", "val", "test"]) -> FileSource:
    """One part of CamVid under `root`, void read as 255; DataError for missing folders and unpaired files."""
    return FileSource(pair_files(root / split, root / f"{split}annot"), LABELS)
