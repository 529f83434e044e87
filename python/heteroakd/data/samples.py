"""What a sample is, and the data set that turns pictures into samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

IGNORE_INDEX = 255
"""Label of pixels that neither train nor count."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Sample = tuple[Tensor, Tensor]


class Source(Protocol):
    """Raw pictures by index: image uint8 [3, H, W], or float32 in [0, 1] where 8 bits do not hold it, and label uint8
    [H, W] in {0..K-1, 255}.

    A source hands out tensors that the caller must not write to: they may come from a cache.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(eq=False)
class SegmentationDataset(Dataset[Sample]):
    """Samples of a source after a transform.

    A sample is `(image, label)`: float32 [3, H, W] normalised with ImageNet's mean and standard deviation,
    and int64 [H, W] in {0..K-1, 255}. Indices run from 0 to len - 1; others raise IndexError.
    """

    source: Source
    transform: Callable[[Tensor, Tensor], Sample]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        image, label = self.source[index]
        return self.transform(image, label)


class SegmentationData(NamedTuple):
    """Both parts of a data set and what its K classes are called."""

    train: SegmentationDataset
    """Augmented crops, all of `crop_size`."""
    val: SegmentationDataset
    """Whole images at their native sizes, which may differ and need not be divisible by any stride."""
    classes: tuple[str, ...]
    """K names, in the order of the labels."""
    palette: Tensor
    """Colours of the classes, uint8 [K, 3]."""


class CachedSource:
    """A source whose pictures are kept in memory once they have been asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._pictures: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._pictures:
            self._pictures[index] = self.source[index]
        return self._pictures[index]


def normalize(image: Tensor) -> Tensor:
    """A picture [3, H, W], uint8 or float in [0, 1], as a sample has it: float32, by ImageNet's mean and deviation."""
    scaled = transforms.to_dtype(image, torch.float32, scale=True)
    return transforms.normalize(scaled, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))


def denormalize(image: Tensor) -> Tensor:
    """The picture, uint8 [3, H, W], behind a sample's normalised image, float [3, H, W]."""
    mean = torch.tensor(IMAGENET_MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=image.device).view(3, 1, 1)
    return ((image.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
