"""What a user can say about the data of a run."""

from dataclasses import dataclass
from typing import Literal

DataName = Literal["street", "cityscapes", "voc", "voc_aug", "ade20k", "coco_stuff", "camvid", "folder"]


@dataclass
class DataConfig:
    """Data set and augmentation of a run.

    Raises ValueError, naming the field, for sizes, counts, ranges and probabilities that make no sense.
    """

    name: DataName = "street"
    """Data set: "street" (procedural, built in, no files), a public one as it is downloaded, or "folder" for one of
    your own; docs/trainer.md says what lies where."""
    root: str | None = None
    """Folder that holds the data set; required by all but "street"."""
    crop_size: tuple[int, int] = (128, 192)
    """Height and width of the training crops, in pixels."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor by which a training image is resized before it is cropped."""
    scale_step: float = 0.1
    """Spacing of the factors within `scale_range`; 0 draws them continuously."""
    flip_probability: float = 0.5
    """Probability of mirroring a training image left to right."""
    augment: bool = True
    """Random scale, crop and mirror. false: the middle of every training image at its own size, padded where it is
    smaller than `crop_size`."""
    image_size: tuple[int, int] = (128, 192)
    """Height and width of the images that "street" generates, in pixels."""
    train_images: int = 480
    """Number of training images that "street" generates."""
    val_images: int = 96
    """Number of validation images that "street" generates."""
    seed: int = 0
    """Seed of the scenes of "street"; the randomness of the augmentation is torch's own."""
    evaluation_part: Literal["val", "test"] = "val"
    """Part to evaluate on; "test" for "camvid" only, whose published results are on it: no other set publishes its
    test labels."""
    cache: bool = False
    """Keep decoded training images in memory ("street" always keeps its own); every worker process has a cache of
    its own, so that this is for small sets."""

    def __post_init__(self) -> None:
        if self.evaluation_part == "test" and self.name != "camvid":
            raise ValueError(f"evaluation_part must be 'val' for the data set {self.name!r}, got 'test'")
        for field in ("crop_size", "image_size"):
            value = getattr(self, field)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{field} must be a (height, width) of at least 1 pixel each, got {value}")
        smallest_scene = (32, 32)
        if any(size < limit for size, limit in zip(self.image_size, smallest_scene, strict=True)):
            raise ValueError(f"image_size must be at least {smallest_scene}, got {self.image_size}")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be 0 < smallest <= largest, got {self.scale_range}")
        if self.scale_step < 0:
            raise ValueError(f"scale_step must not be negative, got {self.scale_step}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], got {self.flip_probability}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for field in ("train_images", "val_images"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
