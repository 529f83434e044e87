"""The teacher's outputs on disk, for runs in which every image is always seen the same."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

from heteroakd.config.commands import DistillRun
from heteroakd.config.groups import ModelConfig
from heteroakd.data import SegmentationData
from heteroakd.methods.distiller import Teacher
from heteroakd.networks.taps import TappedNetwork, TappedOutput, probe
from heteroakd.system.distributed import say
from heteroakd.system.signals import reader_may_leave
from heteroakd.training.checkpoint import atomic_file, state_digest, tensor_bytes
from heteroakd.training.step import PRECISIONS

SUFFIX = ".pt"


class CachedTeacher(Teacher):
    """A `Teacher` that computes its outputs for an image once: later they come from a file.

    A file is named by a digest of its image, so that other data never meet a stale output. A file that is damaged, or
    of other shapes than expected, is written anew; files appear complete or not at all. A batch of which any image is
    new is computed as a whole, so that what is kept does not depend on which were there.

    Args:
        network: the frozen network.
        folder: where the files lie; of this network, its taps and its precision alone.
        expected: an output for one image, for its shapes.
        maps: keep the feature maps too; without, outputs have none.
    """

    def __init__(self, network: TappedNetwork, folder: Path, expected: TappedOutput, *, maps: bool) -> None:
        super().__init__(network)
        self.folder = folder
        self._maps = maps
        self._shapes = [tensor.shape for tensor in self._kept(expected)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TappedOutput:
        """Feature maps and logits for images float [B, 3, H, W]. Raises OSError where a file cannot be written."""
        paths = [self.folder / f"{_digest(image)}{SUFFIX}" for image in images]
        found = [self._read(path, images.device) for path in paths]
        complete = [tensors for tensors in found if tensors is not None]
        if len(complete) == len(found):
            *maps, logits = (torch.cat(parts) for parts in zip(*complete, strict=True))
            return TappedOutput(tuple(maps), logits)
        output = super().__call__(images)
        kept = self._kept(output)
        for number, path in enumerate(paths):
            if found[number] is None:
                self._write(path, [tensor[number : number + 1].clone() for tensor in kept])
        return output if self._maps else TappedOutput((), output.logits)

    def _kept(self, output: TappedOutput) -> list[Tensor]:
        return [*(output.maps if self._maps else ()), output.logits]

    def _write(self, path: Path, tensors: list[Tensor]) -> None:
        try:
            with atomic_file(path) as file:
                torch.save({"tensors": tensors, "checksum": _checksum(tensors)}, file)
        except (OSError, RuntimeError) as error:  # of a full disk torch raises RuntimeError, after the OSError
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise OSError(f"runtime.teacher_cache: {path} cannot be written ({cause})") from error

    def _read(self, path: Path, device: torch.device) -> list[Tensor] | None:
        if not path.is_file():
            return None
        try:
            contents = torch.load(path, map_location=device, weights_only=True)
            tensors: list[Tensor] = contents["tensors"]
            right = [tensor.shape for tensor in tensors] == self._shapes
            if right and _checksum(tensors) == contents["checksum"]:  # torch does not look for flipped bits
                return tensors
        except Exception:  # zip, pickle and OS errors: torch documents no common kind
            pass
        with reader_may_leave(sys.stdout):
            print(f"runtime.teacher_cache: {path} is damaged, computed anew", flush=True)
        return None


def _digest(image: Tensor) -> str:
    return hashlib.blake2b(tensor_bytes(image), digest_size=20).hexdigest()


def _checksum(tensors: list[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor_bytes(tensor), checksum)
    return checksum


def network_digest(network: TappedNetwork, config: ModelConfig | None = None) -> str:
    """What tells trained networks apart: a digest of all weights, the taps and, as networks of the same weights may
    compute different things, the layers with their settings and what `config` builds the network of."""
    built = None if config is None else (config.architecture, config.encoder, sorted(config.options.items()))
    weights = state_digest(network.network.state_dict())
    return hashlib.blake2b(f"{network.taps} {built} {network.network} {weights}".encode(), digest_size=8).hexdigest()


def open_cache(config: DistillRun, network: TappedNetwork, data: SegmentationData) -> CachedTeacher:
    """The cache that `runtime.teacher_cache` asks for; prints how large it will be.

    Raises ValueError where the run's images are random or the folder has no name, and OSError where the disk has too
    little space.
    """
    if config.data.augment:
        raise ValueError(
            "runtime.teacher_cache keeps an output per training image, and with data.augment every crop is another: "
            "set data.augment to false, or runtime.teacher_cache to null"
        )
    if not str(config.runtime.teacher_cache).strip():
        raise ValueError(f"runtime.teacher_cache must name a folder, or be null, got {config.runtime.teacher_cache!r}")
    expected = probe(network, config.data.crop_size)
    height, width = config.data.crop_size
    digest = network_digest(network, config.teacher.model)
    name = f"{config.data.name}-{height}x{width}-{config.optimizer.precision}-{digest}"
    maps = config.method.startswith("heteroakd")
    folder = Path(str(config.runtime.teacher_cache)).expanduser() / (name if maps else f"{name}-logits")
    teacher = CachedTeacher(network, folder, expected, maps=maps)
    itemsize = PRECISIONS[config.optimizer.precision].itemsize
    each = itemsize * sum(tensor.numel() for tensor in teacher._kept(expected))
    count = len(data.train)
    there = len(list(folder.glob(f"*{SUFFIX}"))) if folder.is_dir() else 0
    text = f"{count} images x {each / 1e6:.3g} MB = {count * each / 1e9:.3g} GB in {folder}, {there} of them there"
    say(f"teacher cache: {text}")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if (count - there) * each > free:
        raise OSError(f"runtime.teacher_cache: {text}, and only {free / 1e9:.3g} GB free")
    return teacher
