"""ADE20K's benchmark SceneParse150 as it is downloaded (ADEChallengeData2016.zip): 150 classes, sizes vary.

    root/images/{training,validation}/*.jpg
    root/annotations/{training,validation}/*.png       0: unlabelled, read as 255; others minus 1

`root` may also be the folder that ADEChallengeData2016 lies in. The full ADE20K (ADE20K_2016_07_26, ADE20K_2021_17_01)
is another set of files and is refused.

Reference: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

from pathlib import Path
from typing import Literal

from heteroakd.data.files import DataError, FileSource, LabelValues, need_folder, pair_files
from heteroakd.data.samples import IGNORE_INDEX

ARCHIVE = "ADEChallengeData2016.zip"
LABELS = LabelValues.of(
    150, {0: IGNORE_INDEX, **{value: value - 1 for value in range(1, 151)}}, "0 (unlabelled) to 150"
)
_FOLDERS = {"train": "training", "val": "validation"}
_ONLY_IN_THE_FULL_SET = (
    "index_ade20k.mat", "index_ade20k.pkl", "images/ADE", "ADE20K_2016_07_26", "ADE20K_2021_17_01",
)  # fmt: skip


def ade20k_source(root: Path, split: Literal["train", "val"]) -> FileSource:
    """One part of SceneParse150 under `root`.

    Raises DataError for missing folders, unpaired files and the full ADE20K.
    """
    base = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    if not (base / "annotations").is_dir():
        _refuse_the_full_set(base)
    folder = _FOLDERS[split]
    images = need_folder(base / "images" / folder, f"the contents of {ARCHIVE}")
    labels = need_folder(base / "annotations" / folder, f"the contents of {ARCHIVE}")
    return FileSource(pair_files(images, labels), LABELS)


def _refuse_the_full_set(root: Path) -> None:
    for name in _ONLY_IN_THE_FULL_SET:
        if (root / name).exists():
            raise DataError(
                f"{root / name}: this belongs to the full ADE20K, whose *_seg.png hold more than 3000 classes in two "
                f"colour channels; expected the benchmark of 150 classes, SceneParse150: {ARCHIVE} of "
                f"http://sceneparsing.csail.mit.edu, with the folders images and annotations"
            )
