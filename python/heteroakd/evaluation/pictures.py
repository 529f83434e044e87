"""Pictures of labels and of maps: coloured labels, overlays, heat maps, and captioned panels of them."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from heteroakd.data import IGNORE_INDEX
from heteroakd.evaluation.fonts import font_for
from heteroakd.system.files import atomic_file

NEUTRAL = (96, 96, 96)
"""Colour of pixels that have no class and of values that are NaN; `viridis` and the project's palettes lack it."""

FONT_SIZE = 14  # pixels
_PAPER, _INK = (255, 255, 255), (32, 32, 36)
_GAP = 8  # pixels between the pictures of a panel
_SMALLEST_WIDTH = 288  # pictures below this width, in pixels, are enlarged by whole factors so that captions fit


def colorize(label: Tensor, palette: Tensor) -> Tensor:
    """A label picture in the colours of its classes, uint8 [3, H, W]; 255 becomes NEUTRAL. `label` is [H, W] of any
    integer type in {0..K-1, 255} and `palette` uint8 [K, 3]. Raises ValueError for other values."""
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
    """The colours of a label over its picture, uint8 [3, H, W]; ignored pixels show the picture. `image` is uint8
    [3, H, W], `label` and `palette` as in `colorize`, `alpha` in [0, 1] the share of the colours."""
    image = image.cpu()
    blended = (image.float() + alpha * (colorize(label, palette).float() - image.float())).round().to(torch.uint8)
    return torch.where(label.cpu() == IGNORE_INDEX, image, blended)


def heatmap(values: Tensor, *, maximum: float = 1.0) -> Tensor:
    """Float values [H, W] as colours of the perceptually uniform map `viridis` (dark is 0), uint8 [3, H, W]; values
    outside 0 to `maximum` take its end colours, NaN becomes NEUTRAL."""
    scaled = (values.detach().double().cpu() / maximum).clamp(0, 1)
    missing = scaled.isnan()
    colours = matplotlib.colormaps["viridis"](scaled.nan_to_num().numpy(), bytes=True)[..., :3].copy()
    colours[missing.numpy()] = NEUTRAL
    return torch.from_numpy(colours).permute(2, 0, 1).contiguous()


def labelled_class_map(maps: Tensor, label: Tensor) -> Tensor:
    """Of maps per class, float [K, H, W], the value at every pixel's labelled class, [H, W]; NaN where ignored. `label`
    is integer [H, W] in {0..K-1, 255}. Raises ValueError for labels out of range."""
    label, ignored = _checked(label, maps.shape[0])
    chosen = maps.gather(0, label.masked_fill(ignored, 0)[None])[0]
    return chosen.masked_fill(ignored, math.nan)


def panel(pictures: Sequence[tuple[str, Tensor]], path: str | Path, **options: Any) -> None:
    """Write what `sheet_of` makes of the same arguments, see `save_png`."""
    save_png(Path(path), sheet_of(pictures, **options))


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a PNG. The file appears complete or not at all; folders are made as needed. Raises OSError if it cannot be
    written."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def sheet_of(
    pictures: Sequence[tuple[str, Tensor]],
    *,
    columns: int | None = None,
    classes: Sequence[str] = (),
    palette: Tensor | None = None,
) -> Image.Image:
    """Captioned pictures, side by side in rows of `columns` (default: one row), as one.

    There is at least one, uint8 [3, H, W], enlarged by whole factors where it is small; with `classes` (K names) and
    `palette` (uint8 [K, 3]) a legend stands below them.
    """
    font = font_for("".join([caption for caption, _ in pictures] + list(classes)), FONT_SIZE)
    line = int(font.getbbox("Ag|")[3]) + 7
    tiles = [(caption, _enlarged(picture)) for caption, picture in pictures]
    per_row, cell = min(columns or len(tiles), len(tiles)), max(tile.width for _, tile in tiles)
    rows = [tiles[start : start + per_row] for start in range(0, len(tiles), per_row)]
    width = per_row * (cell + _GAP) + _GAP
    tops = [*accumulate((line + max(tile.height for _, tile in row) + _GAP for row in rows), initial=_GAP)]
    places: list[tuple[int, int]] = []
    x, y = _GAP, tops[-1]
    for needed in (line + 12 + int(font.getlength(name)) for name in classes):
        if x > _GAP and x + needed > width - _GAP:
            x, y = _GAP, y + line
        places.append((x, y))
        x += needed
    sheet = Image.new("RGB", (width, y + line + _GAP if places else y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=False):
        for left, (caption, tile) in zip(range(_GAP, width, cell + _GAP), row, strict=False):
            while caption and draw.textlength(caption, font=font) > tile.width:
                caption = caption[:-2] + "…" if len(caption) > 2 else ""
            draw.text((left, top + 2), caption, fill=_INK, font=font)
            sheet.paste(tile, (left, top + line))
    for name, colour, (x, y) in zip(classes, () if palette is None else palette.tolist(), places, strict=True):
        draw.rectangle((x, y + 5, x + line - 10, y + line - 5), fill=tuple(colour), outline=(140, 140, 140))
        draw.text((x + line - 4, y + 2), name, fill=_INK, font=font)
    return sheet


def _enlarged(picture: Tensor) -> Image.Image:
    factor = max(1, math.ceil(_SMALLEST_WIDTH / picture.shape[2]))
    shown = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
    return shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
