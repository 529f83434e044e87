"""`heteroakd export`: a checkpoint's network alone, as a torch.export program or an ONNX model, checked on an image."""

from __future__ import annotations

import copy
import importlib
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hetero_kernels.taps import output_logits
from heteroakd.commands.predict import read_image
from heteroakd.config.commands import ExportRun
from heteroakd.data.samples import IMAGENET_MEAN, IMAGENET_STD
from heteroakd.evaluation.metrics import none_if_nan
from heteroakd.networks.shapes import stride_of
from heteroakd.networks.weights import MissingPackageError
from heteroakd.system.files import atomic_file
from heteroakd.training.trained import Trained, load_trained

METADATA = "heteroakd.json"
"""Name of the extra file of a .pt2 that holds the metadata."""
METADATA_KEY = "heteroakd"
"""Key of the same among an ONNX model's metadata_props."""
SUFFIXES = (".pt2", ".onnx")
KINDS = ("sizes", "batch", "none")
"""What may vary, the most first."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_COUNT = 2**31
"""Of strides or images: what may vary must vary up to there."""
INPUT, OUTPUT = "images", "logits"

Runner = Callable[[Tensor], Tensor]
"""Logits of images, as the exported file computes them."""


class PlainNetwork(nn.Module):
    """What is exported: a network without its tap.

    Args:
        network: maps images [B, 3, H, W] to logits [B, K, h, w], see `hetero_kernels.taps.output_logits`.
        upsample: interpolate the logits to H x W, as the evaluation does.
        align_corners: of that interpolation.
    """

    def __init__(self, network: nn.Module, upsample: bool, align_corners: bool) -> None:
        super().__init__()
        self.network = network
        self.upsample = upsample
        self.align_corners = align_corners

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] -> logits float32 [B, K, H, W], or at their native stride."""
        logits = output_logits(self.network(images))
        if self.upsample:
            logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return logits


def run_export(config: ExportRun) -> dict[str, Any]:
    """Write the network to `config.output`, in the format of its suffix; returns the metadata that the file holds.

    The file appears when what is in it gave the logits of PyTorch. Raises ValueError for another suffix, an image size
    that is no multiple of the network's stride, a network that cannot be exported as asked, and a difference above
    `config.tolerance`; MissingPackageError without the packages that ONNX needs.
    """
    path = Path(config.output)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output must end with {' or '.join(SUFFIXES)}, got {config.output!r}")
    if path.suffix == ".onnx":
        _need_onnx()
    trained = load_trained(config, "cpu")
    image = trained.build_data().val[0][0] if config.image is None else read_image(Path(config.image))
    stride = stride_of(trained.network)
    images = example(image, stride, config.image_size)
    plain = PlainNetwork(trained.network, config.upsample, trained.align_corners).eval()
    try:
        program, dynamic = trace(copy.deepcopy(plain), images, stride, config.dynamic)
        metadata = describe_export(config, trained, plain, dynamic, images)
        contents, run = (as_onnx if path.suffix == ".onnx" else as_pt2)(program, metadata)
        difference, agreement = compare(run, plain, images, dynamic)
    except Exception as error:  # torch and onnxruntime document no common kind
        less = KINDS[KINDS.index(config.dynamic) + 1 :]
        advice = f"; dynamic may be {' or '.join(less)} instead" if less else ""
        raise ValueError(f"nothing was written, dynamic {config.dynamic!r}: {_first_line(error)}{advice}") from error
    if not difference <= config.tolerance:
        raise ValueError(
            f"the exported network differs from PyTorch by {difference:.3g} of the largest logit, tolerance is "
            f"{config.tolerance:.3g}"
        )
    print(
        f"{path}: largest difference from PyTorch {difference:.2g} of the largest logit (tolerance "
        f"{config.tolerance:.2g}), the same class at {100 * agreement:.4f} % of the places",
        flush=True,
    )
    with atomic_file(path) as file:
        file.write(contents)
    print(f"written: {path}, {len(contents) / 2**20:.1f} MiB, dynamic: {', '.join(dynamic) or 'nothing'}")
    return metadata


def example(image: Tensor, stride: int, size: tuple[int, int] | None) -> Tensor:
    """A batch float32 [1, 3, H, W] of an image float [3, h, w]: resized to `size`, which must be a multiple of the
    stride, or padded with the mean colour to the next one; two strides at least, else sizes could not be dynamic."""
    if size is not None:
        if any(length < 1 or length % stride for length in size):
            raise ValueError(f"image_size must be multiples of the network's stride {stride}, got {tuple(size)}")
        image = F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]
    height, width = (max(2 * stride, length + -length % stride) for length in image.shape[-2:])
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))[None]


def _first_line(error: Exception) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def trace(plain: PlainNetwork, images: Tensor, stride: int, kind: str) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The network as a program, and which of "batch", "height", "width" may vary in it, by `kind` of KINDS. Raises
    what torch.export raises, and ValueError, where the network does not allow it."""
    if kind == "sizes" and any(isinstance(module, Conv2dSame) for module in plain.modules()):
        # Tracing it takes hours: every size becomes a formula of the one before.
        raise ValueError("TensorFlow's \"same\" padding depends on the image's size")
    dimensions: dict[int, Any] = {}
    names: tuple[str, ...] = ()
    if kind != "none":
        dimensions[0], names = Dim("batch"), ("batch",)
        images = torch.cat([images, images])  # a batch of 1 would be taken for a constant
    if kind == "sizes":
        dimensions[2], dimensions[3] = stride * Dim("rows"), stride * Dim("columns")
        names = ("batch", "height", "width")
        images = images.new_zeros(2, 3, 4 * stride, 6 * stride)  # nothing that a network computes equal by chance
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(plain, (images,), dynamic_shapes=(dimensions,), strict=False)
    for allowed in program.range_constraints.values():  # ONNX cannot refuse other sizes, and would compute them wrongly
        if allowed.lower > 2 or allowed.upper < LARGEST_COUNT:
            raise ValueError(
                f"the network does something else outside {allowed.lower} to {allowed.upper} strides of an image's "
                "side, or images of a batch"
            )
    return program, names


def as_pt2(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[bytes, Runner]:
    """The file as torch.export saves it, and a runner of what was read back."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    contents = buffer.getvalue()
    return contents, torch.export.load(io.BytesIO(contents)).module()


def _need_onnx() -> None:
    for package in ONNX_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"ONNX needs the package {package}: pip install 'hetero-kernels[export]' (or "
                f"pip install {' '.join(ONNX_PACKAGES)})"
            ) from error


def as_onnx(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[bytes, Runner]:
    """The file as an ONNX model with its weights inside, and a runner of it in onnxruntime on the CPU."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], external_data=False
        )
    assert converted is not None
    converted.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    contents = converted.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is said once, by the error
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return contents, run


@torch.no_grad()
def compare(run: Runner, plain: PlainNetwork, images: Tensor, dynamic: tuple[str, ...]) -> tuple[float, float]:
    """Largest difference of an exported file's logits from the checkpoint's network, as a share of the largest logit,
    and the share of places with the same class; over the images, and over two of another size where that may vary."""
    batches = [images]
    if "height" in dynamic:
        stride = stride_of(plain.network)
        for size in ((3 * stride, 5 * stride), (7 * stride, 3 * stride)):  # wide and tall
            other = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            batches.append(torch.cat([other, other.flip(-1)]))
    elif "batch" in dynamic:
        batches.append(torch.cat([images, images.flip(-1)]))
    differences, agreements = [], []
    for batch in batches:
        expected, actual = plain(batch), run(batch)
        if actual.shape != expected.shape:
            raise ValueError(
                f"the exported network's logits must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
            )
        differences.append(float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
        agreements.append(float((actual.argmax(1) == expected.argmax(1)).float().mean()))
    return max(differences), min(agreements)


def describe_export(
    config: ExportRun, trained: Trained, plain: PlainNetwork, dynamic: tuple[str, ...], images: Tensor
) -> dict[str, Any]:
    """What a program that uses the file must know; JSON-compatible."""
    checkpoint, measured = trained.checkpoint, {**trained.measured, "root": None}
    return {
        "format": "heteroakd export",
        "version": 1,
        "input": f"{INPUT}: float32 [batch, 3, height, width], RGB in [0, 1], then (value - mean) / std",
        "output": f"{OUTPUT}: float32 [batch, {len(checkpoint.classes)}, "
        + ("height, width]" if config.upsample else "rows, columns] at the network's own stride"),
        "classes": checkpoint.classes,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "stride": stride_of(plain.network),
        "dynamic": list(dynamic),
        "image_size": list(images.shape[-2:]),
        "upsampled": config.upsample,
        "align_corners": plain.align_corners,
        "network": checkpoint.model,
        "step": checkpoint.step,
        "miou": none_if_nan(checkpoint.metrics["miou"]),
        "measured": measured,
        "torch": str(torch.__version__),
    }
