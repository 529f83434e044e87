"""Data sets for semantic segmentation: procedural streets, public sets as they are downloaded, folders of one's own."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from heteroakd.config.groups import DataConfig
from heteroakd.data import folder, street
from heteroakd.data.augmentation import EvalTransform, FixedTransform, TrainTransform
from heteroakd.data.files import DataError
from heteroakd.data.published import PUBLISHED
from heteroakd.data.samples import (
    IGNORE_INDEX,
    CachedSource,
    Sample,
    SegmentationData,
    SegmentationDataset,
    Source,
    denormalize,
)

__all__ = [
    "DataConfig",
    "DataError",
    "IGNORE_INDEX",
    "Sample",
    "SegmentationData",
    "build_data",
    "class_palette",
    "denormalize",
]


@lru_cache(maxsize=4)
def _street_source(part: Literal["train", "val"], count: int, size: tuple[int, int], seed: int) -> CachedSource:
    """Scenes that are generated once per process, however many runs use them."""
    return CachedSource(street.StreetScenes(part, count, size, seed))


def build_data(config: DataConfig) -> SegmentationData:
    """Training and validation part of the data set that `config` names; lazy, but for the lists of files.

    Raises DataError, naming the file or folder, if the files under `config.root` are not laid out as the module of
    the data set describes; what is inside the pictures is checked when they are read. Raises ValueError if a root is
    needed and missing.
    """
    train: Source
    val: Source
    if config.name == "street":
        size = (config.image_size[0], config.image_size[1])
        train = _street_source("train", config.train_images, size, config.seed)
        val = _street_source("val", config.val_images, size, config.seed)
        classes, colours = street.CLASSES, street.PALETTE
    else:
        if config.root is None:
            raise ValueError(f"root must name the folder of the data set {config.name!r}, got None")
        root = Path(config.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; expected the root of the data set {config.name!r}")
        if config.name in PUBLISHED:
            published = PUBLISHED[config.name]
            classes, colours = published.classes()
            train, val = published.source(root, "train"), published.source(root, config.evaluation_part)
        elif config.name == "folder":
            classes, colours = folder.read_classes(root / "classes.txt")
            train, val = (folder.folder_source(config, part, colours) for part in ("train", config.evaluation_part))
        else:
            names = ", ".join(map(repr, ("street", "folder", *PUBLISHED)))
            raise ValueError(f"name must be one of {names}, got {config.name!r}")
        if config.cache:
            train = CachedSource(train)
    augmentation: FixedTransform | TrainTransform = FixedTransform(config.crop_size)
    if config.augment:
        augmentation = TrainTransform(config.crop_size, config.scale_range, config.scale_step, config.flip_probability)
    return SegmentationData(
        SegmentationDataset(train, augmentation),
        SegmentationDataset(val, EvalTransform()),
        classes,
        torch.tensor(colours, dtype=torch.uint8),
    )


def class_palette(config: DataConfig, classes: Sequence[str]) -> torch.Tensor:
    """Colours uint8 [K, 3] of a data set's K classes, without its images; a fixed series where the classes are not its
    own, or its classes.txt is not here. Raises DataError where that is here and cannot be read."""
    names: Sequence[str] = ()
    colours: Sequence[folder.Colour] = ()
    if config.name == "street":
        names, colours = street.CLASSES, street.PALETTE
    elif config.name in PUBLISHED:
        names, colours = PUBLISHED[config.name].classes()
    elif config.root is not None and (file := Path(config.root) / "classes.txt").is_file():
        names, colours = folder.read_classes(file)
    if tuple(names) != tuple(classes):
        colours = [folder.series_colour(index) for index in range(len(classes))]
    return torch.tensor(colours, dtype=torch.uint8)
