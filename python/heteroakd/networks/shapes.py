"""What networks give for a training crop: shapes at their taps, found without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hetero_kernels.taps import Tapped, device_of
from hetero_kernels.taps import probe as run_once
from hetero_kernels.taps import tap_paths as tap_paths

DEFAULT_STRIDE = 32  # of networks that do not state an encoder.output_stride
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Tapped]] = WeakKeyDictionary()


def stride_of(network: nn.Module) -> int:
    """Height and width of a network's images must be multiples of this."""
    return int(getattr(getattr(network, "encoder", None), "output_stride", DEFAULT_STRIDE))


@contextmanager
def batch_norm_named(network: nn.Module) -> Iterator[None]:
    """Give the ValueError of a batch norm that sees one value per channel the module's name and the cure."""
    try:
        yield
    except ValueError as error:
        callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(module is caller for caller in callers):
                raise ValueError(
                    f"{name}: {error}; raise schedule.batch_size, of which each process and micro-batch has its part, "
                    "or data.crop_size"
                ) from error
        raise


def probe(network: nn.Module, paths: Sequence[str], image_size: tuple[int, int]) -> Tapped:
    """Logits and the feature maps of modules, on the meta device, for one image of `image_size` (H, W).

    A network runs once for paths and size, on a zero image in eval mode: on CPUs a large crop takes seconds.

    Raises ValueError if `image_size` is not a multiple of the network's stride, for an unknown path (listing what could
    be meant), and for what the network raises.
    """
    if any(size % stride_of(network) for size in image_size):
        raise ValueError(
            f"image size {tuple(image_size)} (data.crop_size) must be a multiple of {stride_of(network)}, "
            f"the stride of the network"
        )
    known = _KNOWN.setdefault(network, {})
    key = (*paths, *image_size)
    if key not in known:
        known[key] = run_once(network, paths, torch.zeros(1, 3, *image_size, device=device_of(network)))
    return known[key]
