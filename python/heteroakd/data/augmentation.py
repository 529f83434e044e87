"""From raw pictures to samples: random scale, crop and flip for training, nothing random for evaluation.

All randomness is drawn from torch's default generator, which a DataLoader seeds in every worker.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from heteroakd.data.samples import IGNORE_INDEX, IMAGENET_MEAN, Sample, normalize

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


def eval_transform(image: Tensor, label: Tensor) -> Sample:
    """The whole image at its native size, [3, H, W] of uint8 or float32 in [0, 1], and its label, uint8 [H, W]:
    normalised, and int64."""
    return normalize(image), label.long()


class TrainTransform:
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
        self.steps = {}
        for dtype, fill in _MEAN_COLOUR.items():
            fills: dict[Any, Any] = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORE_INDEX}
            self.steps[dtype] = v2.Compose(
                [
                    RandomRescale(scale_range, scale_step),
                    v2.RandomCrop(crop_size, pad_if_needed=True, fill=fills),
                    v2.RandomHorizontalFlip(flip_probability),
                ]
            )

    def __call__(self, image: Tensor, label: Tensor) -> Sample:
        """Image and label as in `eval_transform`."""
        image, label = self.steps[image.dtype](tv_tensors.Image(image), tv_tensors.Mask(label))
        return eval_transform(image.as_subclass(Tensor).contiguous(), label.as_subclass(Tensor).contiguous())
