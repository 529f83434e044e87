"""`heteroakd predict`: a trained network's predictions as overlays and as label PNGs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from heteroakd.config.commands import PredictRun
from heteroakd.data import class_palette, denormalize, reading
from heteroakd.data.files import IMAGE_SUFFIXES, DataError
from heteroakd.data.samples import SegmentationDataset, normalize
from heteroakd.evaluation.inference import LARGEST_WHOLE, WINDOW, bounded, predict
from heteroakd.evaluation.pictures import overlay, save_png
from heteroakd.system.distributed import say
from heteroakd.system.files import remove_leftovers
from heteroakd.training.trained import load_trained

LABEL_ENDING = "_labels"
LARGEST_INDEX = 255  # of an 8 bit PNG
IN_WINDOWS = (
    "images of more pixels than {}x{} are predicted in windows of {}x{}, for want of memory; --evaluation.window says "
    "otherwise, one as large as the images: whole"
).format(*LARGEST_WHOLE, *WINDOW)


def run_predict(config: PredictRun) -> list[Path]:
    """Write one overlay PNG per image into `config.output`, and its label PNG where asked; returns the overlays' paths.

    Images of more pixels than LARGEST_WHOLE are predicted in windows, unless the options say otherwise, and a line says
    so. Raises ValueError for wrong options at once, and, naming the first, for images that failed after all others have
    been predicted.
    """
    trained = load_trained(config, config.device, evaluation=config.evaluation)
    options = trained.evaluation
    val = None if config.images else trained.build_data().val  # the data set need not be here
    palette = class_palette(trained.data, trained.checkpoint.classes)
    if config.labels and len(palette) > LARGEST_INDEX + 1:
        raise ValueError(f"labels are written as 8 bit PNGs of up to {LARGEST_INDEX + 1} classes, got {len(palette)}")
    written: list[Path] = []
    failed: list[Exception] = []
    images, sources = _images(config, val)
    images = images[: config.limit]
    _keep_sources(config, [name for name, _ in images], sources)
    remove_leftovers(Path(config.output))
    told = False
    for name, source in tqdm(images, "predicting", unit="image", disable=None):
        try:
            image = val[source][0] if val is not None and isinstance(source, int) else read_image(Path(source))
            chosen = bounded(options, image)
            if chosen != options and not told:
                say(f"{name}: {IN_WINDOWS}")
                told = True
            classes = predict(trained.network, image, chosen, align_corners=trained.align_corners).cpu()
            picture = overlay(denormalize(image), classes, palette, alpha=config.alpha)
            path = Path(config.output) / f"{name}.png"
            save_png(path, Image.fromarray(picture.permute(1, 2, 0).numpy()))
            if config.labels:
                write_labels(path.with_name(f"{name}{LABEL_ENDING}.png"), classes, palette)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # torch says RuntimeError for want of memory
            named = isinstance(error, (DataError, OSError))
            failed.append(error if named else RuntimeError(f"{source}: {str(error) or type(error).__name__}"))
            continue
        written.append(path)
    print(f"{len(written)} overlays in {config.output}", flush=True)
    if failed:
        what = "cannot be read" if all(isinstance(error, DataError) for error in failed) else "failed"
        raise ValueError(f"{len(failed)} of {len(images)} images {what}; the first: {failed[0]}")
    return written


def write_labels(path: Path, labels: Tensor, palette: Tensor) -> None:
    """Labels int [H, W] in [0, K) as a PNG whose pixels are these numbers, shown in the classes' colours: `palette`
    uint8 [K, 3], K up to 256."""
    indexed = Image.fromarray(labels.to(torch.uint8).numpy(), mode="P")
    indexed.putpalette(palette.flatten().tolist())
    save_png(path, indexed)


def _images(config: PredictRun, val: SegmentationDataset | None) -> tuple[list[tuple[str, Path | int]], Sequence[Path]]:
    """Names for the PNGs, and image files or indices of val images; all files that these are read from."""
    if val is None:
        files = image_files(config.images)
        return list(zip(_names(files), files, strict=True)), files
    if found := reading.files_of(val.source):
        names = _names([pair.image for pair in found.pairs])
        return list(zip(names, range(len(val)), strict=True)), [path for pair in found.pairs for path in pair]
    return [(f"val_{index:04d}", index) for index in range(len(val))], []


def _keep_sources(config: PredictRun, names: list[str], sources: Sequence[Path]) -> None:
    """Raises ValueError, naming the first, where a PNG of one of these names would replace a picture that is read."""
    kept = {path.resolve() for path in sources}
    endings = ("", LABEL_ENDING) if config.labels else ("",)
    for path in (Path(config.output) / f"{name}{ending}.png" for name in names for ending in endings):
        if path.resolve() in kept:
            raise ValueError(f"{path} is one of the images and would be replaced: output must be another folder")


def _names(files: Sequence[Path]) -> Iterator[str]:
    """The files' stems, numbered where another file, or the labels of one, have the same."""
    taken: set[str] = set()
    for path in files:
        name, copies = path.stem, 1
        while not taken.isdisjoint({name, name + LABEL_ENDING}):
            copies += 1
            name = f"{path.stem}_{copies}"
        taken |= {name, name + LABEL_ENDING}
        yield name


def image_files(paths: list[str]) -> list[Path]:
    """The files among `paths` and the image files in the folders among them, sorted within each folder.

    Raises FileNotFoundError for a path that does not exist and ValueError for a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            named = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and not file.is_dir()]
            found = [file for file in named if file.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise ValueError(f"{path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
    return files


def read_image(path: Path) -> Tensor:
    """An image file as float32 [3, H, W], ImageNet-normalised. Raises DataError as the reader of data sets."""
    return normalize(reading.read_image(path))
