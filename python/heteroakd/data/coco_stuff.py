"""COCO-Stuff-164k as it is downloaded (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip): sizes vary.

    root/images/{train,val}2017/*.jpg
    root/annotations/{train,val}2017/*.png      0 to 181, and 255: unlabelled

The label values are the 182 classes, of which 11 occur nowhere: a mean over the classes leaves out those of them that
are not predicted either.

Reference: Caesar, Uijlings, Ferrari, "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018.
"""

from pathlib import Path

from heteroakd.data.files import FileSource, LabelValues, need_folder, pair_files

LABELS = LabelValues(182)


def coco_stuff_source(root: Path, split: str) -> FileSource:
    """One part, "train" or "val", of COCO-Stuff-164k. Raises DataError for missing folders and unpaired files."""
    name = f"{split}2017"
    images = need_folder(root / "images" / name, f"the contents of {name}.zip")
    labels = need_folder(
        root / "annotations" / name,
        "the PNGs of stuffthingmaps_trainval2017.zip (the JSON files of annotations_trainval2017.zip hold no stuff)",
    )
    # mmsegmentation writes its converted labels beside the originals.
    return FileSource(pair_files(images, labels, skip_label="_labelTrainIds"), LABELS)
