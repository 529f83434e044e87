"""Data sets for semantic segmentation: procedural streets, public sets as they are downloaded, folders of one's own."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from heteroakd.config.groups import DataConfig
from heteroakd.data import folder, street
from heteroakd.data.augmentation import TrainTransform, eval_transform
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
        train = _street_source("train", config.train_images, config.image_size, config.seed)
        val = _street_source("val", config.val_images, config.image_size, config.seed)
        classes, colours = _classes(config)
    else:
        if config.root is None:
            raise ValueError(f"root must name the folder of the data set {config.name!r}, got None")
        root = Path(config.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; expected the root of the data set {config.name!r}")
        classes, colours = _classes(config)
        if config.name == "folder":
            train, val = (folder.folder_source(config, part, colours) for part in ("train", config.evaluation_part))
        else:
            train, val = (PUBLISHED[config.name].source(root, part) for part in ("train", config.evaluation_part))
        if config.cache:
            train = CachedSource(train)
    augmentation = TrainTransform(config.crop_size, config.scale_range, config.scale_step, config.flip_probability)
    return SegmentationData(
        SegmentationDataset(train, augmentation),
        SegmentationDataset(val, eval_transform),
        classes,
        torch.tensor(colours, dtype=torch.uint8),
    )


def _classes(config: DataConfig) -> tuple[tuple[str, ...], tuple[folder.Colour, ...]]:
    if config.name == "street":
        return street.CLASSES, street.PALETTE
    if config.name in PUBLISHED:
        return PUBLISHED[config.name].classes()
    return folder.read_classes(Path(config.root or "") / "classes.txt")


def class_palette(config: DataConfig, classes: Sequence[str]) -> torch.Tensor:
    """Colours uint8 [K, 3] of a data set's K classes, without its images; a fixed series where the classes are not its
    own, or its classes.txt is not here. Raises DataError where that is here and cannot be read."""
    colours = tuple(folder.series_colour(index) for index in range(len(classes)))
    if config.name != "folder" or (config.root is not None and (Path(config.root) / "classes.txt").is_file()):
        names, own = _classes(config)
        colours = own if names == tuple(classes) else colours
    return torch.tensor(colours, dtype=torch.uint8)
