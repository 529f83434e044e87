"""`heteroakd predict`: overlay PNGs of a trained network's predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from heteroakd.checkpoint import atomic_file
from heteroakd.command_config import PredictRun
from heteroakd.commands import load_trained, saved_loss
from heteroakd.data import SegmentationData, denormalize
from heteroakd.data.samples import IMAGENET_MEAN, IMAGENET_STD
from heteroakd.evaluate import predict
from heteroakd.pictures import overlay

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def run_predict(config: PredictRun) -> list[Path]:
    """Write one overlay PNG per image into `config.output`; returns their paths."""
    if not 0 <= config.alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {config.alpha}")
    checkpoint, network, data = load_trained(config.checkpoint, None, config.root, config.device, config.threads)
    align_corners = saved_loss(checkpoint).logits_align_corners
    written: list[Path] = []
    for name, image in _images(config, data):
        if config.limit is not None and len(written) >= config.limit:
            break
        classes = predict(network, image, align_corners=align_corners).cpu()
        path = Path(config.output) / f"{name}.png"
        with atomic_file(path) as file:
            picture = overlay(denormalize(image), classes, data.palette, alpha=config.alpha)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, format="PNG")
        written.append(path)
    print(f"{len(written)} overlays in {config.output}")
    return written


def _images(config: PredictRun, data: SegmentationData) -> Iterator[tuple[str, Tensor]]:
    """Names for the PNGs and images float32 [3, H, W], ImageNet-normalised."""
    if not config.images:
        for index in range(len(data.val)):
            yield f"val_{index:04d}", data.val[index][0]
        return
    names: set[str] = set()
    for path in image_files(config.images):
        name, copies = path.stem, 1
        while name in names:  # the same name from another folder
            copies += 1
            name = f"{path.stem}_{copies}"
        names.add(name)
        yield name, read_image(path)


def image_files(paths: list[str]) -> list[Path]:
    """The files among `paths` and the image files in the folders among them, sorted within each folder.

    Raises FileNotFoundError for a path that does not exist and ValueError for a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
    return files


def read_image(path: Path) -> Tensor:
    """An image file as float32 [3, H, W], ImageNet-normalised. Raises ValueError, naming it, where it is none."""
    try:
        with Image.open(path) as file:
            image = transforms.pil_to_tensor(file.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
    image = transforms.to_dtype(image, torch.float32, scale=True)
    return transforms.normalize(image, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
