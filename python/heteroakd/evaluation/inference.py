"""What a network says of one whole image: at once or in windows, at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_kernels.taps import output_logits
from heteroakd.config.groups import EvaluationConfig
from heteroakd.networks.shapes import stride_of

LARGEST_WHOLE = (2048, 1024)
"""Width and height of the largest image, by its pixels, that `bounded` leaves whole."""
WINDOW = (1024, 1024)
"""The windows of larger ones."""
WHOLE = EvaluationConfig()
"""Whole image, single scale, not mirrored."""
BAND = 128  # rows of scores that are handed on at once


def bounded(options: EvaluationConfig, image: Tensor) -> EvaluationConfig:
    """The options with windows where they have none and an image [3, H, W] at its largest scale has more pixels than
    LARGEST_WHOLE: the memory that a whole image takes grows with their square in a Transformer."""
    pixels = image.shape[-2] * image.shape[-1] * max(options.scales) ** 2
    if options.window is not None or pixels <= LARGEST_WHOLE[0] * LARGEST_WHOLE[1]:
        return options
    return replace(options, window=WINDOW)


def window_stride(options: EvaluationConfig) -> tuple[int, int]:
    """The windows' stride (vertical, horizontal): two thirds of the window unless it is given."""
    assert options.window is not None
    if options.window_stride is not None:
        return options.window_stride
    height, width = (max(1, 2 * size // 3) for size in options.window)
    return height, width


def pad(image: Tensor, stride: int) -> Tensor:
    """An image float [3, H, W] as a batch [1, 3, H', W'], padded at its right and bottom to multiples of a stride by 0,
    the mean colour."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % stride, 0, -height % stride))[None]


@torch.no_grad()
def whole_logits(network: nn.Module, image: Tensor, *, align_corners: bool = False) -> Tensor:
    """Logits float32 [K, H, W] of an image float [3, H, W] that the network sees at once, on the network's device; here
    and below [N, K, H, W] where the network gives N maps of logits of an image."""
    padded = pad(image, stride_of(network))
    logits = output_logits(network(padded.to(next(network.parameters()).device)))
    return at_label_size(logits, (padded.shape[2], padded.shape[3]), image, align_corners).squeeze(0)


def at_label_size(logits: Tensor, padded_size: tuple[int, int], image: Tensor, align_corners: bool) -> Tensor:
    """Coarse logits [N, K, h, w] of a padded image, float32 and as large as the image [3, H, W]."""
    full = F.interpolate(logits.float(), size=padded_size, mode="bilinear", align_corners=align_corners)
    return full[:, :, : image.shape[-2], : image.shape[-1]]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side of `length` pixels: every `stride`, the last one moved back to end with the
    side. One window, at 0, where the side is not longer than it."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def window_bands(
    network: nn.Module,
    image: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    *,
    align_corners: bool = False,
) -> Iterator[Tensor]:
    """Logits float32 [K, H, W] of an image float [3, H, W] in windows (H, W), a band of rows [K, h, W] after the other
    as soon as no later window covers it: where windows overlap, the mean of their logits at label size, as
    MMSegmentation has it. A side shorter than the window's is seen at once."""
    height, width = image.shape[-2:]
    tops, rows = window_starts(height, window[0], stride[0]), min(window[0], height)
    sums, count = torch.empty(0), torch.zeros(rows, width)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in window_starts(width, window[1], stride[1]):
            columns = slice(left, min(left + window[1], width))
            logits = whole_logits(network, image[:, top : top + rows, columns], align_corners=align_corners)
            sums = sums if sums.numel() else logits.new_zeros(*logits.shape[:-2], rows, width)
            sums[..., columns] += logits
            count[:, columns] += 1
        done = following - top
        for band in (slice(start, min(start + BAND, done)) for start in range(0, done, BAND)):
            yield sums[..., band, :] / count[band].to(sums.device)
        for held in (sums, count):
            kept = held[..., done:, :].clone()
            held.zero_()[..., : rows - done, :] = kept


def score_bands(
    network: nn.Module, image: Tensor, options: EvaluationConfig = WHOLE, *, align_corners: bool = False
) -> Iterator[Tensor]:
    """Scores float32 [K, h, W] of an image float [3, H, W], a band of rows after the other, on the network's device;
    the largest is the prediction. Without windows, at scale 1 alone, there is one band.

    Of one view of the image they are logits; of several (scales, mirrored) the mean of the views' softmax, each
    brought to the image's size as logits before. The network should be in eval mode.
    """
    views = [(scale, mirrored) for scale in options.scales for mirrored in (False, True)[: 1 + options.flip]]
    streams = [_view(network, image, *view, options, align_corners) for view in views]
    if len(views) == 1:
        yield from streams[0]
        return
    for same in in_step(streams):
        shares = (logits.softmax(-3) for logits in same)
        total = next(shares)
        for share in shares:
            total += share
        yield total / len(views)


def in_step(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """Several streams of bands [..., h, W], as many rows in all, in bands of the same rows: as many as all have."""
    bands = [next(stream, None) for stream in streams]
    while present := [band for band in bands if band is not None]:
        assert len(present) == len(streams), "a stream of bands has fewer rows than another"
        rows = min(band.shape[-2] for band in present)
        yield [band[..., :rows, :] for band in present]
        for number, band in enumerate(present):
            bands[number] = band[..., rows:, :] if band.shape[-2] > rows else next(streams[number], None)


def _view(
    network: nn.Module, image: Tensor, scale: float, mirrored: bool, options: EvaluationConfig, align_corners: bool
) -> Iterator[Tensor]:
    """Logits [K, h, W] of an image by one view of it, in bands."""
    view = _resize(image, scale)
    seen = view.flip(-1) if mirrored else view
    if options.window is None:
        bands = iter([whole_logits(network, seen, align_corners=align_corners)])
    else:
        bands = window_bands(network, seen, options.window, window_stride(options), align_corners=align_corners)
    bands = (band.flip(-1) if mirrored else band for band in bands)
    if view.shape == image.shape:
        return bands
    return resized_bands(bands, view.shape[-2], (image.shape[-2], image.shape[-1]), align_corners)


def resized_bands(bands: Iterator[Tensor], rows: int, size: tuple[int, int], align_corners: bool) -> Iterator[Tensor]:
    """Maps [..., K, h, w] that come in bands, `rows` in all, as F.interpolate brings all of it to `size` (H, W), in
    bands [..., K, h', W] of at most BAND rows, as soon as the rows between which they lie are there."""
    places, half = np.arange(size[0], dtype=np.float32), np.float32(0.5)
    if align_corners:
        places *= np.float32((rows - 1) / max(1, size[0] - 1))
    else:
        places = np.maximum((places + half) * np.float32(rows / size[0]) - half, 0)
    above = places.astype(np.int64)
    below, shares = np.minimum(above + 1, rows - 1), torch.from_numpy(np.float32(places - above))[:, None]
    held, first, done = torch.empty(0), 0, 0
    for band in bands:
        held = torch.cat([held, band], -2) if held.numel() else band
        there = int(np.searchsorted(below, first + held.shape[-2]))
        while done < there:
            chosen = slice(done, min(done + BAND, there))
            start = int(above[chosen.start])
            part = held[..., start - first : int(below[chosen.stop - 1]) + 1 - first, :]
            # Along the rows alone, so that what lies between two bands can be found from both.
            wide = F.interpolate(part.flatten(0, -3), size[1], mode="linear", align_corners=align_corners)
            wide = wide.view(*part.shape[:-1], size[1])
            upper, lower = (wide[..., torch.from_numpy(place[chosen] - start), :] for place in (above, below))
            share = shares[chosen].to(wide.device)
            yield upper * (1 - share) + lower * share
            done = chosen.stop
        passed = min(int(above[min(done, size[0] - 1)]) - first, held.shape[-2])
        held, first = held[..., passed:, :], first + passed


def _resize(image: Tensor, scale: float) -> Tensor:
    """As training's augmentation resizes: bilinear, with antialiasing."""
    height, width = (max(1, round(length * scale)) for length in image.shape[-2:])
    if (height, width) == image.shape[-2:]:
        return image
    return F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]


def predict(
    network: nn.Module, image: Tensor, options: EvaluationConfig = WHOLE, *, align_corners: bool = False
) -> Tensor:
    """Predicted classes int64 [H, W] of an image float [3, H, W], see `score_bands`; [N, H, W] of N maps. In windows,
    no more scores are in memory than a row of windows has, of every view where there are several."""
    bands = score_bands(network, image, options, align_corners=align_corners)
    return torch.cat([band.argmax(-3) for band in bands], -2)
