"""The options of data sets, and what they may be."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from heteroakd.config.options import LAST_SEED, SCALES, Options, number

DataName = Literal["street", "cityscapes", "voc", "voc_aug", "ade20k", "coco_stuff", "camvid", "folder"]


@dataclass
class DataConfig(Options):
    """Data set and augmentation of a run.

    Raises ValueError, naming the field, for sizes, counts, ranges and probabilities that make no sense.
    """

    name: DataName = "street"
    """Data set: "street" (procedural, built in, no files), a public one as it is downloaded, or "folder" for one of
    your own; docs/trainer.md says what lies where."""
    root: str | None = None
    """Folder that holds the data set; required by all but "street"."""
    crop_size: tuple[int, int] = number((128, 192), 1, 65536)
    """Height and width of the training crops, in pixels."""
    scale_range: tuple[float, float] = number((0.5, 2.0), *SCALES)
    """Smallest and largest factor by which a training image is resized before it is cropped."""
    scale_step: float = number(0.1, 0, 16)
    """Spacing of the factors within `scale_range`; 0 draws them continuously."""
    flip_probability: float = number(0.5, 0, 1)
    """Probability of mirroring a training image left to right."""
    image_size: tuple[int, int] = number((128, 192), 32, 65536)
    """Height and width of the images that "street" generates, in pixels."""
    train_images: int = number(480, 1, 2**31)
    """Number of training images that "street" generates."""
    val_images: int = number(96, 1, 2**31)
    """Number of validation images that "street" generates."""
    seed: int = number(0, 0, LAST_SEED)
    """Seed of the scenes of "street"; the randomness of the augmentation is torch's own."""
    evaluation_part: Literal["val", "test"] = "val"
    """Part to evaluate on; "test" for "folder" and "camvid" only: no other set publishes its test labels."""
    image_folder: str = "images/{part}"
    """Of "folder": where under the root the images lie, in subfolders too; {part} is train, val or test (or training,
    valid, validation, testing). Where a part has a list, a folder without {part} will do."""
    label_folder: str = "labels/{part}"
    """Of "folder": where the labels lie; it may be the images' folder."""
    label_suffix: str = ""
    """Of "folder": what a label's name has more than its image's, "_mask" for a.jpg and a_mask.png; with a type,
    "_mask.png" or ".png", labels of other types are passed over."""
    lists: dict[Literal["train", "val", "test"], str] = field(default_factory=dict)
    """Of "folder": text files in the root that name a part's images, one a line, or an image and its label as paths in
    the root; e.g. {train: train.txt, val: val.txt}. A part without one is all of its folder."""
    label_values: dict[int | str, int] | None = None
    """Of "folder": classes by the values, or the colours, of the label files, {0: 0, 255: 1} or {"#ff0000": 1}; class
    255 is ignored, "other" stands for all that is not named. null: values are classes, colours as in classes.txt."""
    cache: bool = False
    """Keep decoded training images in memory ("street" always keeps its own); every worker process has a cache of
    its own, so that this is for small sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "street":
            self.refuse_unused("by the data set 'street', which has no files (name says which set is)", "root")
        else:
            self.refuse_unused(
                f"by the data set {self.name!r}, only by 'street'", "image_size", "train_images", "val_images", "seed"
            )
        if self.name != "folder":
            self.refuse_unused(f"by the data set {self.name!r}, only by 'folder'", *_OF_A_FOLDER)
        if self.evaluation_part == "test" and self.name not in ("camvid", "folder"):
            raise ValueError(f"evaluation_part must be 'val' for the data set {self.name!r}, got 'test'")
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range must be smallest and largest, got {self.scale_range}")
        if self.label_values is not None:  # as JSON has it, so that a checkpoint gives back what it was given
            values: dict[str, int] = {}
            for value, index in self.label_values.items():
                name = str(int(value)) if str(value).isdecimal() else str(value).lower()
                if name in values:
                    raise ValueError(f"label_values must say each value once, got {name} twice")
                values[name] = index
                if not re.fullmatch(r"#[0-9a-f]{6}|\d{1,5}|other", name) or (name.isdigit() and int(name) > 65535):
                    names = 'numbers from 0 to 65535, colours #rrggbb or "other"'
                    raise ValueError(f"label_values must map {names}, got {name!r}")
            if wrong := [index for index in values.values() if type(index) is not int or not 0 <= index <= 255]:
                raise ValueError(f"label_values must map to classes 0 to 254 or 255 (ignore), got {wrong[0]}")
            if len({name[0] == "#" for name in values if name != "other"}) > 1:
                raise ValueError(f"label_values must map numbers or colours, not both, got {values}")
            self.label_values = {name: values[name] for name in values}


_OF_A_FOLDER = ("image_folder", "label_folder", "label_suffix", "lists", "label_values")
