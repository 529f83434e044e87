"""The order in which a gradient of features lies in memory: of an operator's fake and of every backend's kernels."""

from __future__ import annotations

from torch import Tensor


def keeps_channels_last(features: Tensor) -> bool:
    """Whether the gradient of features that a loss read in any order has neighbouring channels side by side."""
    return features.stride(1) == 1 and features.shape[1] > 1


def reads_channels_last(features: Tensor) -> bool:
    """Whether the projection's kernels read features [B, C, h, w] with neighbouring channels side by side; their
    gradient has the same order."""
    _, channels, height, width = features.shape
    _, by_channel, by_row, by_column = features.stride()
    channels_adjacent = channels == 1 or by_channel == 1
    if height * width == 1:
        return channels_adjacent
    joined = height == 1 or width == 1 or by_row == by_column * width
    return joined and channels_adjacent and (by_column if width > 1 else by_row) != 1
