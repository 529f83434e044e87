"""Cityscapes as it is downloaded (leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip): 2048x1024, 19 classes.

    root/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    root/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png

The 34 label ids are mapped to the 19 train ids as they are read; nothing has to be converted before. The labels of
the test part are not published.

Reference: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

from pathlib import Path

from heteroakd.data.files import DataError, FileSource, LabelValues, need_folder, pair_files
from heteroakd.data.samples import IGNORE_INDEX

# By train id from 0. The other ids are void, or too rare for the benchmark.
TRAINED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABELS = LabelValues.of(
    len(TRAINED_IDS),
    {**dict.fromkeys(range(34), IGNORE_INDEX), **{label: train_id for train_id, label in enumerate(TRAINED_IDS)}},
    "a label id of Cityscapes, 0 to 33",
)


def cityscapes_source(root: Path, split: str) -> FileSource:
    """One part, "train" or "val", of Cityscapes under `root`, in the order of the cities' and the images' names.

    Raises DataError for missing folders and unpaired files.
    """
    images = need_folder(root / "leftImg8bit" / split, "the contents of leftImg8bit_trainvaltest.zip")
    labels = need_folder(root / "gtFine" / split, "the contents of gtFine_trainvaltest.zip")
    cities = sorted({folder.name for part in (images, labels) for folder in part.iterdir() if folder.is_dir()})
    if not cities:
        raise DataError(f"{images}: no city's folder in it; expected the contents of leftImg8bit_trainvaltest.zip")
    pairs = [
        pair
        for city in cities
        for pair in pair_files(
            images / city, labels / city, image_ending="_leftImg8bit", label_ending="_gtFine_labelIds"
        )
    ]
    return FileSource(pairs, LABELS)
