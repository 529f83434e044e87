"""From raw pictures to samples: random scale, crop and flip for training, nothing random for evaluation.

All randomness is drawn from torch's default generator, which a DataLoader seeds in every worker.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from heteroakd.data.samples import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD, Sample

_MEAN_COLOUR: dict[torch.dtype, list[float]] = {  # what is padded is 0 after normalisation
    torch.uint8: [round(255 * mean) for mean in IMAGENET_MEAN],
    torch.float32: list(IMAGENET_MEAN),
}


class RandomRescale(v2.Transform):
    """Resize image and mask by one random factor of the native size.

    The factor is one of smallest, smallest + step ... largest, or continuous for `step` 0.
    """

    def __init__(self, scale_range: tuple[float, float], step: float = 0.0) -> None:
        super().__init__()
        self.scale_range = scale_range
        self.step = step

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        smallest, largest = self.scale_range
        if self.step > 0:
            choices = int((largest - smallest) / self.step + 1e-6) + 1
            scale = smallest + self.step * int(torch.randint(choices, ()))
        else:
            scale = smallest + (largest - smallest) * float(torch.rand(()))
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            # torchvision resizes masks with "nearest", which samples pixel corners and shifts them by up to half a
            # pixel against the image; "nearest-exact" samples pixel centres, as bilinear interpolation does.
            plain = inpt.as_subclass(Tensor).unsqueeze(0)
            resized = F.resize(plain, params["size"], interpolation=v2.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(resized.squeeze(0), like=inpt)
        return F.resize(inpt, params["size"], antialias=True)


class _Transform:
    """Apply torchvision's transforms to an image, [3, H, W] of uint8 or float32 in [0, 1], and its label, uint8 [H, W],
    together; `steps` makes them from the colour that pads."""

    def __init__(self, steps: Callable[[list[float]], Sequence[v2.Transform]] = lambda fill: ()) -> None:
        dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
        last = (v2.ToDtype(dtypes, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
        self.steps = {dtype: v2.Compose([*steps(fill), *last]) for dtype, fill in _MEAN_COLOUR.items()}

    def __call__(self, image: Tensor, label: Tensor) -> Sample:
        image, label = self.steps[image.dtype](tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(Tensor).contiguous(), label.as_subclass(Tensor).contiguous()


class TrainTransform(_Transform):
    """Random scale of the native size, padding where needed, random crop, random mirror, normalisation.

    Padding is ImageNet's mean colour in the image and 255 in the label; every crop is `crop_size` (H, W).
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (0.5, 2.0),
        scale_step: float = 0.1,
        flip_probability: float = 0.5,
    ) -> None:
        def steps(fill: list[float]) -> Sequence[v2.Transform]:
            fills: dict[Any, Any] = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORE_INDEX}
            return (
                RandomRescale(scale_range, scale_step),
                v2.RandomCrop(crop_size, pad_if_needed=True, fill=fills),
                v2.RandomHorizontalFlip(flip_probability),
            )

        super().__init__(steps)


class _MiddleCrop(v2.Transform):
    """The middle (H, W) of image and mask, padded at the right and bottom where they are smaller."""

    def __init__(self, size: tuple[int, int], fill: list[float]) -> None:
        super().__init__()
        self.size = size
        self.fill = fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        fill = IGNORE_INDEX if isinstance(inpt, tv_tensors.Mask) else self.fill
        missing = [max(0, self.size[1] - width), max(0, self.size[0] - height)]
        return F.center_crop(F.pad(inpt, [0, 0, *missing], fill=fill), list(self.size))


class FixedTransform(_Transform):
    """Nothing random: the middle `crop_size` (H, W) of an image at its own size, padded as `TrainTransform` does."""

    def __init__(self, crop_size: tuple[int, int]) -> None:
        super().__init__(lambda fill: [_MiddleCrop(crop_size, fill)])


class EvalTransform(_Transform):
    """Normalisation only: the whole image at its native size."""
