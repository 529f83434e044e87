"""Evaluation: argmax of fp32 scores at label size, IoU from one int64 confusion matrix over all images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from heteroakd.config.groups import DataConfig, EvaluationConfig, to_dict
from heteroakd.data import IGNORE_INDEX
from heteroakd.evaluation.inference import WHOLE, predict, window_stride
from heteroakd.system.distributed import is_main, rank, sum_over_processes, world_size
from heteroakd.system.signals import StopRequest, leave_signals_to_the_parent


@dataclass
class Evaluation:
    """What was counted over a data set."""

    confusion: Tensor
    """int64 [K, K]: pixels by labelled class (row) and predicted class (column), ignored pixels left out."""
    classes: tuple[str, ...]
    """K class names."""
    images: int
    """Number of images."""

    @property
    def iou(self) -> Tensor:
        """float64 [K]: intersection over union; NaN for a class that is neither labelled nor predicted anywhere."""
        confusion = self.confusion.double()
        intersection = confusion.diagonal()
        return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)

    @property
    def absent(self) -> list[str]:
        """Classes that are neither labelled nor predicted: they have no IoU, and the mean leaves them out."""
        return [name for name, missing in zip(self.classes, self.iou.isnan().tolist(), strict=True) if missing]

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that are not absent, as torchmetrics' JaccardIndex has it; NaN where all are.

        A class that is predicted somewhere but labelled nowhere counts with its IoU of 0.
        """
        return float(self.iou.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of labelled pixels that are predicted right; NaN where none is labelled."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible: miou, pixel_accuracy, iou by class (null where absent), absent, images."""
        iou = {name: none_if_nan(value) for name, value in zip(self.classes, self.iou.tolist(), strict=True)}
        return {
            "miou": none_if_nan(self.miou),
            "pixel_accuracy": none_if_nan(self.pixel_accuracy),
            "iou": iou,
            "absent": self.absent,
            "images": self.images,
        }

    def table(self) -> str:
        """Text for a terminal: one line per class, then the mean and what it leaves out."""
        width = max(len(name) for name in (*self.classes, "mean"))
        lines = [
            f"{name:<{width}}  " + ("absent" if math.isnan(value) else f"{100 * value:6.2f} %")
            for name, value in zip(self.classes, self.iou.tolist(), strict=True)
        ]
        lines.append(f"{'mean':<{width}}  {100 * self.miou:6.2f} %  (mIoU over {self.images} images)")
        if self.absent:
            lines.append(f"the mean leaves out classes neither labelled nor predicted: {', '.join(self.absent)}")
        return "\n".join(lines)


def how_measured(data: DataConfig, options: EvaluationConfig) -> dict[str, Any]:
    """How a mIoU is measured, JSON-compatible: of which images, and how the network is applied to them."""
    stride = window_stride(options) if options.window else None
    part = {"data": data.name, "root": data.root, "part": data.evaluation_part}
    return {**part, **to_dict(replace(options, window_stride=stride))}


def in_words(measured: dict[str, Any]) -> str:
    """What `how_measured` says."""
    where = measured["data"] + (f" in {measured['root']}" if measured["root"] else "")
    how = "whole images"
    if measured["window"]:
        how = "windows of {}x{} every {}x{}".format(*measured["window"], *measured["window_stride"])
    scales = "scale " if len(measured["scales"]) == 1 else "mean of the scales "
    scales += ", ".join(f"{scale:g}" for scale in measured["scales"])
    mirrored = ", mirrored too" if measured["flip"] else ""
    return f"on the {measured['part']} part of {where}: {how}, {scales}{mirrored}"


def none_if_nan(value: float) -> float | None:
    """The value as JSON has it, which knows no NaN."""
    return None if math.isnan(value) else value


def evaluate(network: nn.Module, *data: Any, **how: Any) -> Evaluation:
    """What `evaluate_maps` counts, with the same arguments, of a network that gives one map of logits."""
    return evaluate_maps(network, 1, *data, **how)[0]


def evaluate_maps(
    network: nn.Module,
    maps: int,
    dataset: Dataset[tuple[Tensor, Tensor]],
    classes: tuple[str, ...],
    options: EvaluationConfig = WHOLE,
    *,
    align_corners: bool = False,
    limit: int | None = None,
    workers: int = 0,
    progress: bool = False,
    stop: StopRequest | None = None,
) -> list[Evaluation]:
    """Count predictions against labels over the first `limit` samples of a data set (all by default), for each of the
    `maps` maps of logits that one run of the network gives of an image. `workers` processes read the samples (0: this
    one). Over several processes each counts its share of them, every sample once, and all get the sum. `progress` shows
    a bar where there is a terminal. Once `stop` has its signal the other images of this process are left out.

    The network is put into eval mode and back. Raises ValueError for labels outside [0, K) that are not 255.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    confusions = torch.zeros(maps, len(classes), len(classes), dtype=torch.int64)
    training = network.training
    network.eval()
    own = range(rank(), count, world_size())
    loader = DataLoader(
        Subset(dataset, own),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # else the loader draws from torch's own, and shifts the training's dropout
    )
    disable = None if progress and is_main() else True
    for index, (image, label) in zip(
        own, tqdm(loader, "evaluating", unit="image", leave=False, disable=disable), strict=True
    ):
        if stop is not None and stop.signal_number is not None:
            break
        counted = label != IGNORE_INDEX
        if (wrong := counted & ((label < 0) | (label >= len(classes)))).any():
            raise ValueError(
                f"label {index} holds {int(label[wrong][0])}, expected 0 to {len(classes) - 1} or {IGNORE_INDEX}"
            )
        predictions = predict(network, image, options, align_corners=align_corners).cpu()
        rows = len(classes) * label[counted].long()
        for confusion, prediction in zip(confusions, predictions.view(-1, *label.shape), strict=True):
            confusion += torch.bincount(rows + prediction[counted], minlength=confusion.numel()).view_as(confusion)
    network.train(training)
    return [Evaluation(sum_over_processes(confusion), classes, count) for confusion in confusions]
