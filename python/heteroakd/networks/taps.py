"""Taps: a network that also returns feature maps of modules inside it, and shapes without side effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DEFAULT_STRIDE = 32  # of networks that do not state an encoder.output_stride
LOGITS = ("out", "logits")
"""Where dictionaries hold the logits: torchvision's, Hugging Face's."""


class TappedOutput(NamedTuple):
    """What a `TappedNetwork` returns, each tensor at its own stride."""

    maps: tuple[Tensor, ...]
    """Feature map at every tap, [B, C, h, w]."""
    logits: Tensor
    """Output logits [B, K, h, w]."""
    auxiliary: Tensor | None = None
    """Feature map for an auxiliary head, where the network was given an `auxiliary_tap`."""

    @property
    def features(self) -> Tensor:
        """Feature map at the last tap, mostly the only one."""
        return self.maps[-1]


class TappedNetwork(nn.Module):
    """A segmentation network that returns feature maps of modules inside it beside its logits.

    Args:
        network: maps images [B, 3, H, W] to logits [B, K, h, w], or to a tuple, list or dictionary with them, see
            `output_logits`.
        taps: path, or paths, of modules of `network` (as in `named_modules`) whose output is a feature map
            [B, C, h, w], or a list or dictionary of them, the last of which is taken.
        auxiliary_tap: one more such path, for an auxiliary head.

    Raises ValueError for an unknown path, listing the paths that could be meant, and for no or repeated taps.
    """

    def __init__(self, network: nn.Module, taps: str | Sequence[str], auxiliary_tap: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.taps = (taps,) if isinstance(taps, str) else tuple(taps)
        self.auxiliary_tap = auxiliary_tap
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise ValueError(f"tap must name at least one module, and each once, got {list(self.taps)}")
        self._recorded: dict[str, Tensor] = {}
        modules = dict(network.named_modules())
        for path in dict.fromkeys([*self.taps, *([] if auxiliary_tap is None else [auxiliary_tap])]):
            if not path or path not in modules:
                raise ValueError(f"tap {path!r} names no module of the network; candidates: {_candidates(network)}")
            modules[path].register_forward_hook(partial(self._record, path))

    @property
    def stride(self) -> int:
        """Height and width of images must be multiples of this."""
        encoder = getattr(self.network, "encoder", None)
        return int(getattr(encoder, "output_stride", DEFAULT_STRIDE))

    def forward(self, images: Tensor) -> TappedOutput:
        """Images [B, 3, H, W] -> feature maps at the taps and logits."""
        logits = output_logits(self.network(images))
        recorded, self._recorded = self._recorded, {}
        for path in self.taps if self.auxiliary_tap is None else (*self.taps, self.auxiliary_tap):
            if path not in recorded:
                raise ValueError(f"tap {path!r} is a module that the network did not run")
        auxiliary = None if self.auxiliary_tap is None else recorded[self.auxiliary_tap]
        return TappedOutput(tuple(recorded[path] for path in self.taps), logits, auxiliary)

    def _record(self, path: str, module: nn.Module, inputs: object, output: object) -> None:
        features = last_feature_map(output)
        if features is None:
            raise ValueError(
                f"tap {path!r} must return a feature map [B, C, h, w] or a list of them, got {_describe(output)}; "
                f"candidates: {_candidates(self.network)}"
            )
        self._recorded[path] = features


def output_logits(output: object) -> Tensor:
    """The logits [B, K, h, w] in what a network returns: the tensor itself, the first element of a tuple or list, or
    the entry "out" (torchvision) or "logits" (Hugging Face) of a dictionary.

    Raises ValueError, saying what came, where there is no such tensor.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[name] for name in LOGITS if name in output), None)
    elif isinstance(output, list | tuple) and output:
        logits = output[0]
    if not (isinstance(logits, Tensor) and logits.ndim == 4):
        raise ValueError(
            "the network must return logits [B, K, h, w], a tuple or list that begins with them, or a dictionary with "
            f"them as {' or '.join(map(repr, LOGITS))}; got {_describe(output)}"
        )
    return logits


def last_feature_map(output: object) -> Tensor | None:
    """The output itself or, of a list or dictionary, its last element, if that is a tensor [B, C, h, w]; else None."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple) and output:
        output = output[-1]
    return output if isinstance(output, Tensor) and output.ndim == 4 else None


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output)) or 'nothing in it'}"
    if isinstance(output, list | tuple) and output:
        return f"a {type(output).__name__} that begins with {_describe(output[0])}"
    return f"a {type(output).__name__}"


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
            network.eval()(torch.zeros(1, 3, 64, 64, device=_device(network)))
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in network.named_modules():
            module._forward_hooks.update(outer_hooks[name])
        network.train(training)
    names = sorted(found, key=lambda name: (name.count("."), name))
    if not names:
        return "none, as no module inside the network returns a feature map"
    listed = ", ".join(f"{name} ({found[name][0]} channels)" for name in names[:limit])
    return f"{listed}{' and deeper ones' if len(names) > limit else ''}"


def _device(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise ValueError("the network has no parameters: there is nothing to train")
    return parameter.device


def _run_once(network: TappedNetwork, image_size: tuple[int, int]) -> TappedOutput:
    """A zero image through the network in eval mode. Raises ValueError for whatever a user's own network raises."""
    training = network.training
    try:
        output: TappedOutput = network.eval()(torch.zeros(1, 3, *image_size, device=_device(network)))
    except ValueError:
        raise
    except Exception as error:
        name = type(network.network).__name__
        raise ValueError(
            f"the network {name} fails on an image [1, 3, {image_size[0]}, {image_size[1]}]: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        network.train(training)
    return output


_PROBED: WeakKeyDictionary[TappedNetwork, dict[tuple[int, int], TappedOutput]] = WeakKeyDictionary()
"""What `probe` found, by network and size."""


@torch.no_grad()
def probe(network: TappedNetwork, image_size: tuple[int, int]) -> TappedOutput:
    """Feature maps and logits of one image [1, 3, H, W] on the meta device: shapes and dtypes, without side effects.

    A network runs once for a size, on a zero image in eval mode: on CPUs a large crop takes seconds.

    Raises ValueError if `image_size` is not a multiple of the network's stride, and for what the network raises.
    """
    if any(size % network.stride for size in image_size):
        raise ValueError(
            f"image size {tuple(image_size)} (data.crop_size) must be a multiple of {network.stride}, "
            f"the stride of the network"
        )
    known = _PROBED.setdefault(network, {})
    size = (image_size[0], image_size[1])
    if size not in known:
        output = _run_once(network, size)
        auxiliary = None if output.auxiliary is None else output.auxiliary.to("meta")
        known[size] = TappedOutput(
            tuple(features.to("meta") for features in output.maps), output.logits.to("meta"), auxiliary
        )
    return known[size]
