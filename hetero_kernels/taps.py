"""Networks as they are: the logits in what they return, feature maps of modules inside them, shapes by a trial run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .arguments import LOGITS


class Tap:
    """Forward hook of one module, which keeps what the module returned while a forward listens, and nothing else.

    It refers to no network, so that copies and pickles of a network take nothing along but taps of their own.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.path = path
        self.listening = False
        self.ran = False
        self.output: Any = None
        # Kept for pickling: with the handle the hook's number is taken in the process that loads it.
        self.handle = _module_at(network, path).register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.listening:
            self.ran, self.output = True, output


class Tapped(NamedTuple):
    """What a network gave for a batch."""

    logits: Tensor
    """[B, K, h, w]."""
    maps: tuple[Tensor, ...]
    """Feature map [B, C, h, w] of every tap, in their order."""


def tap_paths(paths: str | Sequence[str]) -> list[str]:
    """One path or several, as a list."""
    return [paths] if isinstance(paths, str) else list(paths)


def tap(network: nn.Module, paths: Sequence[str]) -> tuple[Tap, ...]:
    """Taps on modules of ``network``, by their paths in ``named_modules``.

    Raises:
        ValueError: no path, one twice, or one that names no module inside the network; lists those that return maps.
    """
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"tap must name at least one module, and each once, got {list(paths)}")
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"tap is {path!r}, expected the path of a module, a str")
        if _module_at(network, path) is None:
            raise ValueError(f"tap {path!r} names no module of the network; candidates: {candidates(network)}")
    return tuple(Tap(network, path) for path in paths)


def run(
    network: nn.Module, taps: Sequence[Tap], images: Tensor, call: Callable[[Tensor], object] | None = None
) -> Tapped:
    """A forward of ``network``, or ``call`` of it, with its taps listening.

    Raises:
        ValueError: there are no logits in what it returns, or a tap did not run or returned no feature map.
    """
    try:
        for each in taps:
            each.listening = True
        returned = (call or network)(images)
        maps = [last_feature_map(each.output) for each in taps]
        for each, features in zip(taps, maps, strict=True):
            if features is None:
                _refuse(network, each)
        return Tapped(output_logits(returned), tuple(maps))  # type: ignore[arg-type]
    finally:
        for each in taps:
            each.listening, each.ran, each.output = False, False, None


def _refuse(network: nn.Module, one: Tap) -> None:
    if not one.ran:
        raise ValueError(
            f"tap {one.path!r} is a module that the network did not run; if it was replaced since (as "
            "convert_sync_batchnorm replaces batch norms), replace it first"
        )
    got = one.output
    hint = ""
    if isinstance(got, Tensor) and got.ndim == 3:
        hint = " (tokens [B, N, C]: tap a module that returns a map)"
    raise ValueError(
        f"tap {one.path!r} must return a feature map [B, C, h, w] or a list of them, got {describe(got)}{hint}; "
        f"candidates: {candidates(network)}"
    )


def output_logits(output: object) -> Tensor:
    """The logits [B, K, h, w] in what a network returns: the tensor itself, the first element of a tuple or list, or
    the entry "out" (torchvision) or "logits" (Hugging Face) of a dictionary.

    Raises:
        ValueError: there is no such tensor; says what came.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[name] for name in LOGITS if name in output), None)
    elif isinstance(output, list | tuple) and output:
        logits = output[0]
    if not (isinstance(logits, Tensor) and logits.ndim == 4):
        raise ValueError(
            "the network must return logits [B, K, h, w], a tuple or list that begins with them, or a dictionary with "
            f"them as {' or '.join(map(repr, LOGITS))}; got {describe(output)}"
        )
    return logits


def last_feature_map(output: object) -> Tensor | None:
    """The output itself or, of a list or dictionary, the last of its last element, if that is a tensor [B, C, h, w]."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = list(output.values())
        if not isinstance(output, list | tuple) or not output:
            return None
        output = output[-1]
    return output if output.ndim == 4 else None


def describe(output: object) -> str:
    """What a network or module returned, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output)) or 'nothing in it'}"
    if isinstance(output, list | tuple) and output:
        return f"a {type(output).__name__} that begins with {describe(output[0])}"
    return f"a {type(output).__name__}"


def candidates(network: nn.Module, limit: int = 24) -> str:
    """Modules that return feature maps, outermost first, found by running a small image through the network."""
    found: dict[str, int] = {}

    def listener(name: str) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            features = last_feature_map(output)
            if features is not None:
                found[name] = features.shape[1]

        return listen

    handles = [module.register_forward_hook(listener(name)) for name, module in network.named_modules() if name]
    try:
        with trial(network) as call:
            call(torch.zeros(1, 3, 64, 64, device=device_of(network)))
    except Exception as error:  # a network's own: what ran before it is a help still
        if not found:
            return f"unknown, as the network fails on an image [1, 3, 64, 64]: {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    names = sorted(found, key=lambda name: (name.count("."), name))
    if not names:
        return "none, as no module inside the network returns a feature map"
    listed = ", ".join(f"{name} ({found[name]} channels)" for name in names[:limit])
    return f"{listed}{' and deeper ones' if len(names) > limit else ''}"


def probe(network: nn.Module, paths: Sequence[str], images: Tensor) -> Tapped:
    """A forward in eval mode with taps at ``paths``, without a trace in hooks, modes, buffers and random state; tensors
    on the meta device.

    Raises:
        ValueError: as :func:`tap` and :func:`run`, and for whatever the network raises.
    """
    taps = tap(network, paths) if paths else ()
    try:
        with trial(network) as call:
            output = run(network, taps, images, call)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the network {type(network).__name__} fails on images {list(images.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for each in taps:
            each.handle.remove()
    return Tapped(output.logits.to("meta"), tuple(features.to("meta") for features in output.maps))


@contextmanager
def trial(network: nn.Module) -> Iterator[Callable[[Tensor], object]]:
    """A call of ``network`` in eval mode, without gradients and on copies of its buffers; modes and random state are
    afterwards what they were."""
    modes = [(module, module.training) for module in network.modules()]
    device = device_of(network)
    copies = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            network.eval()
            yield lambda images: functional_call(network, copies, (images,))
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(network: nn.Module) -> torch.device:
    """Of its first parameter. Raises ValueError where it has none."""
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise ValueError("the network has no parameters: there is nothing to train")
    return parameter.device


def _module_at(network: nn.Module, path: str) -> Any:
    return dict(network.named_modules()).get(path) if path else None
