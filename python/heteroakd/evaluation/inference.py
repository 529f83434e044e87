"""What a network says of one whole image: at once or in windows, at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
LARGEST_SCALE = 16  # beyond it a misplaced digit, which would end in the allocator's words


def check_options(options: EvaluationConfig) -> None:
    """Raises ValueError, naming the option, for values with which some pixel would get no prediction."""
    if not options.scales or any(not 0 < scale <= LARGEST_SCALE for scale in options.scales):
        raise ValueError(
            f"evaluation.scales must hold at least one factor above 0, up to {LARGEST_SCALE}, got {options.scales}"
        )
    if options.window is None:
        if options.window_stride is not None:
            raise ValueError(
                f"evaluation.window_stride is that of evaluation.window, which is null, got {options.window_stride}"
            )
        return
    if len(options.window) != 2 or min(options.window) < 1:
        raise ValueError(f"evaluation.window must be a height and a width of at least 1, got {options.window}")
    stride = window_stride(options)
    if len(stride) != 2 or any(not 1 <= step <= size for step, size in zip(stride, options.window, strict=False)):
        raise ValueError(
            f"evaluation.window_stride must be two numbers from 1 to evaluation.window {options.window}, else pixels "
            f"lie between the windows, got {options.window_stride}"
        )


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
    tops = window_starts(height, window[0], stride[0])
    held, count = torch.empty(0), torch.zeros(0, width)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        bottom = min(top + window[0], height)
        count = torch.cat([count, torch.zeros(bottom - top - len(count), width)])
        for left in window_starts(width, window[1], stride[1]):
            columns = slice(left, min(left + window[1], width))
            logits = whole_logits(network, image[:, top:bottom, columns], align_corners=align_corners)
            held = held if held.numel() else logits.new_zeros(*logits.shape[:-2], 0, width)
            if missing := bottom - top - held.shape[-2]:
                held = torch.cat([held, held.new_zeros(*logits.shape[:-2], missing, width)], -2)
            held[..., columns] += logits
            count[:, columns] += 1
        done = following - top
        yield held[..., :done, :] / count[:done].to(held.device)
        held, count = held[..., done:, :], count[done:]


def score_bands(
    network: nn.Module, image: Tensor, options: EvaluationConfig = WHOLE, *, align_corners: bool = False
) -> Iterator[Tensor]:
    """Scores float32 [K, h, W] of an image float [3, H, W], a band of rows after the other, on the network's device;
    the largest is the prediction. Without windows, and at scales other than 1, there is one band.

    Of one view of the image they are logits; of several (scales, mirrored) the mean of the views' softmax, each
    brought to the image's size as logits before. The network should be in eval mode. Raises ValueError as
    `check_options`.
    """
    check_options(options)
    views = [(scale, mirrored) for scale in options.scales for mirrored in (False, True)[: 1 + options.flip]]
    streams = [_view(network, image, *view, options, align_corners) for view in views]
    if len(views) == 1:
        yield from streams[0]
        return
    in_step = all(scale == 1 for scale in options.scales)  # their bands have the same rows
    for same in zip(*streams, strict=True) if in_step else [(torch.cat(list(each), -2) for each in streams)]:
        shares = (logits.softmax(-3) for logits in same)
        total = next(shares)
        for share in shares:
            total += share
        yield total / len(views)


def _view(
    network: nn.Module, image: Tensor, scale: float, mirrored: bool, options: EvaluationConfig, align_corners: bool
) -> Iterator[Tensor]:
    """Logits [K, h, W] of an image by one view of it, in bands where it is seen at its own size."""
    size = (image.shape[-2], image.shape[-1])
    view = _resize(image, scale)
    view = view.flip(-1) if mirrored else view
    if options.window is None:
        bands = iter([whole_logits(network, view, align_corners=align_corners)])
    else:
        bands = window_bands(network, view, options.window, window_stride(options), align_corners=align_corners)
    if view.shape != image.shape:
        bands = iter([torch.cat(list(bands), -2)])
    for logits in bands:
        logits = logits.flip(-1) if mirrored else logits
        if view.shape != image.shape:
            maps = logits.view(-1, *logits.shape[-3:])
            resized = F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
            logits = resized.view(*logits.shape[:-2], *size)
        yield logits


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
    at scale 1, no more scores are in memory than a row of windows has, of either view where it is mirrored too."""
    bands = score_bands(network, image, options, align_corners=align_corners)
    return torch.cat([band.argmax(-3) for band in bands], -2)
