"""Pictures of labels and of maps: coloured labels, overlays, heat maps, and captioned panels of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from heteroakd.data import IGNORE_INDEX
from heteroakd.evaluation.fonts import Font, font_for
from heteroakd.system.files import atomic_file

NEUTRAL = (96, 96, 96)
"""Colour of pixels that have no class and of values that are NaN; `viridis` and the project's palettes lack it."""

FONT_SIZE = 14  # pixels
_PAPER, _INK = (255, 255, 255), (32, 32, 36)
_GAP = 8  # pixels between the pictures of a panel
_SMALLEST_WIDTH = 288  # pictures below this width, in pixels, are enlarged by whole factors so that captions fit


def _check_picture(picture: Tensor, name: str) -> None:
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8:
        raise ValueError(f"{name} must be uint8 [3, H, W], got {picture.dtype} {list(picture.shape)}")


def colorize(label: Tensor, palette: Tensor) -> Tensor:
    """A label picture in the colours of its classes, uint8 [3, H, W]; 255 becomes NEUTRAL.

    `label` is [H, W] of any integer type in {0..K-1, 255} and `palette` uint8 [K, 3]. Raises ValueError for
    other shapes, types and values.
    """
    if label.ndim != 2 or label.is_floating_point():
        raise ValueError(f"label must be integer [H, W], got {label.dtype} {list(label.shape)}")
    if palette.ndim != 2 or palette.shape[1] != 3 or palette.dtype != torch.uint8:
        raise ValueError(f"palette must be uint8 [K, 3], got {palette.dtype} {list(palette.shape)}")
    colours = torch.cat([palette.cpu(), torch.tensor([NEUTRAL], dtype=torch.uint8)])
    label, ignored = _checked(label.cpu(), len(palette))
    return colours[label.masked_fill(ignored, len(palette))].permute(2, 0, 1).contiguous()


def _checked(label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """A label as int64, and where it is ignored."""
    label = label.long()
    ignored = label == IGNORE_INDEX
    wrong = ~ignored & ((label < 0) | (label >= num_classes))
    if wrong.any():
        raise ValueError(
            f"label must lie in 0..{num_classes - 1} or be {IGNORE_INDEX} (ignore), got {int(label[wrong][0])}"
        )
    return label, ignored


def overlay(image: Tensor, label: Tensor, palette: Tensor, alpha: float = 0.55) -> Tensor:
    """The colours of a label over its picture, uint8 [3, H, W]; ignored pixels show the picture.

    `image` is uint8 [3, H, W], `label` and `palette` as in `colorize`, `alpha` in [0, 1] the share of the
    colours. Raises ValueError for other shapes, types and values.
    """
    _check_picture(image, "image")
    if image.shape[1:] != label.shape:
        raise ValueError(f"label must have the image's size {list(image.shape[1:])}, got {list(label.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    image = image.cpu()
    blended = (image.float() + alpha * (colorize(label, palette).float() - image.float())).round().to(torch.uint8)
    return torch.where(label.cpu() == IGNORE_INDEX, image, blended)


def heatmap(values: Tensor, *, minimum: float = 0.0, maximum: float = 1.0) -> Tensor:
    """Values as colours of the perceptually uniform map `viridis` (dark is `minimum`), uint8 [3, H, W].

    `values` is float [H, W]; values outside the range take its end colours, NaN becomes NEUTRAL. Raises
    ValueError for other shapes and an empty range.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be [H, W], got {list(values.shape)}")
    if not minimum < maximum:
        raise ValueError(f"minimum must be below maximum, got {minimum} and {maximum}")
    scaled = ((values.detach().double().cpu() - minimum) / (maximum - minimum)).clamp(0, 1)
    missing = scaled.isnan()
    colours = matplotlib.colormaps["viridis"](scaled.nan_to_num().numpy(), bytes=True)[..., :3].copy()
    colours[missing.numpy()] = NEUTRAL
    return torch.from_numpy(colours).permute(2, 0, 1).contiguous()


def labelled_class_map(maps: Tensor, label: Tensor) -> Tensor:
    """Of maps per class, float [K, H, W], the value at every pixel's labelled class, [H, W]; NaN where ignored. `label`
    is integer [H, W] in {0..K-1, 255}. Raises ValueError for sizes that differ and labels out of range."""
    if maps.ndim != 3 or maps.shape[1:] != label.shape:
        raise ValueError(f"maps must be [K, H, W] over label [H, W], got {list(maps.shape)} and {list(label.shape)}")
    label, ignored = _checked(label, maps.shape[0])
    chosen = maps.gather(0, label.masked_fill(ignored, 0)[None])[0]
    return chosen.masked_fill(ignored, math.nan)


def _tile(caption: str, picture: Tensor, size: tuple[int, int], font: Font) -> Image.Image:
    height, width = size
    shown = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
    shown = shown.resize((width, height), Image.Resampling.NEAREST)
    line = _line_height(font)
    tile = Image.new("RGB", (width, height + line), _PAPER)
    draw = ImageDraw.Draw(tile)
    while caption and draw.textlength(caption, font=font) > width:
        caption = caption[:-2] + "…" if len(caption) > 2 else ""
    draw.text((0, 2), caption, fill=_INK, font=font)
    tile.paste(shown, (0, line))
    return tile


def _line_height(font: Font) -> int:
    return int(font.getbbox("Ag|")[3]) + 7


def _legend(classes: Sequence[tuple[str, Sequence[int]]], width: int, font: Font) -> Image.Image:
    """The classes' colours and names in as many lines as `width` pixels need."""
    line = _line_height(font)
    swatch = line - 10
    places: list[tuple[int, int]] = []
    x, y = 0, 0
    for name, _ in classes:
        needed = swatch + 6 + int(font.getlength(name)) + 16
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((x, y))
        x += needed
    legend = Image.new("RGB", (width, y + line), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (name, colour), (x, y) in zip(classes, places, strict=True):
        box = (x, y + 5, x + swatch, y + 5 + swatch)
        draw.rectangle(box, fill=(int(colour[0]), int(colour[1]), int(colour[2])), outline=(140, 140, 140))
        draw.text((x + swatch + 6, y + 2), name, fill=_INK, font=font)
    return legend


def panel(pictures: Sequence[tuple[str, Tensor]], path: str | Path, **options: Any) -> None:
    """Write what `sheet_of` makes of the same arguments as a PNG. The file appears complete or not at all; folders are
    made as needed. Raises as it does, and OSError if the file cannot be written."""
    sheet = sheet_of(pictures, **options)
    with atomic_file(Path(path)) as file:
        sheet.save(file, format="PNG")


def sheet_of(
    pictures: Sequence[tuple[str, Tensor]],
    *,
    columns: int | None = None,
    classes: Sequence[str] = (),
    palette: Tensor | None = None,
) -> Image.Image:
    """Captioned pictures, side by side in rows of `columns` (default: one row), as one.

    Pictures are uint8 [3, H, W], enlarged by whole factors where they are small; with `classes` (K names) and
    `palette` (uint8 [K, 3]) a legend stands below them. Raises ValueError for no picture, other shapes and types, and a
    palette that does not fit.
    """
    if not pictures:
        raise ValueError("pictures must hold at least one captioned picture, got none")
    for caption, picture in pictures:
        _check_picture(picture, f"picture {caption!r}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if classes and (palette is None or len(palette) != len(classes)):
        raise ValueError(
            f"palette must hold {len(classes)} colours, one per class, got {0 if palette is None else len(palette)}"
        )
    font = font_for("".join([caption for caption, _ in pictures] + list(classes)), FONT_SIZE)
    tiles = []
    for caption, picture in pictures:
        factor = max(1, math.ceil(_SMALLEST_WIDTH / picture.shape[2]))
        tiles.append(_tile(caption, picture, (factor * picture.shape[1], factor * picture.shape[2]), font))
    per_row = min(columns or len(tiles), len(tiles))
    cell_width = max(tile.width for tile in tiles)
    rows = [tiles[start : start + per_row] for start in range(0, len(tiles), per_row)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = per_row * (cell_width + _GAP) + _GAP
    parts: list[tuple[Image.Image, int, int]] = []
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        parts += [(tile, _GAP + column * (cell_width + _GAP), y) for column, tile in enumerate(row)]
        y += height + _GAP
    if classes and palette is not None:
        legend = _legend(list(zip(classes, palette.tolist(), strict=True)), width - 2 * _GAP, font)
        parts.append((legend, _GAP, y))
        y += legend.height + _GAP
    sheet = Image.new("RGB", (width, y), _PAPER)
    for part, x, top in parts:
        sheet.paste(part, (x, top))
    return sheet
