"""Procedural street scenes: a data set of 12 classes that needs no files.

Every picture is a function of (seed, part, index, size) alone: a random street in perspective, painted from far to
near, under sun, clouds, dusk, night or haze. Colours are antialiased, labels never. Poles, signs, traffic lights and
people are thin and rare, as in a street; shop boards, brick, glass, autumn leaves and grey cars share their colours
with other classes. The own car's bonnet is labelled 255.
"""

from typing import Literal

import torch

from heteroakd.data.street.canvas import CLASSES as CLASSES
from heteroakd.data.street.canvas import PALETTE as PALETTE
from heteroakd.data.street.scene import render_scene

_PARTS = {"train": 0, "val": 1}


class StreetScenes:
    """`count` scenes of `size` (H, W) of one part: image uint8 [3, H, W], label uint8 [H, W] in {0..11, 255}.

    The parts draw from disjoint streams of random numbers: no scene of one is in the other, whatever the counts.
    """

    def __init__(self, part: Literal["train", "val"], count: int, size: tuple[int, int], seed: int = 0) -> None:
        self.part, self.count, self.size, self.seed = part, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture, labels = render_scene((self.seed, _PARTS[self.part], index), self.size)
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)
