"""Pictures of a run: input, label, predictions, and what KMM and KEM make of every pixel."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from hetero_kernels import Distiller, functional
from heteroakd.config.groups import EvaluationConfig
from heteroakd.data import IGNORE_INDEX, denormalize
from heteroakd.evaluation import pictures
from heteroakd.evaluation.inference import at_label_size, pad, predict
from heteroakd.methods import objective_of
from heteroakd.networks.shapes import stride_of
from heteroakd.system.files import atomic_file

MAP_WIDTH = 320  # pixels of the maps that are kept


class KnowledgeMaps(NamedTuple):
    """Values of the labelled class, float32 [H, W], NaN where ignored."""

    reliability: Tensor
    """KMM's S: near 0 the student is the better informed, near 1 the teacher is."""
    weight: Tensor
    """KEM's W: how much of the pixel's attention the labelled class gets."""


@torch.no_grad()
def knowledge_maps(distiller: Distiller, image: Tensor, label: Tensor) -> KnowledgeMaps:
    """Reliability and weight for one sample: image float [3, H, W], label int64 [H, W]; of several taps the last one's.
    The distiller is in eval mode."""
    loss = objective_of(distiller).pairs[-1]
    networks = (distiller.student, cast(nn.Module, distiller.teacher))
    padded = pad(image, math.lcm(*(stride_of(network) for network in networks)))
    outputs = distiller.outputs(padded.to(next(distiller.parameters()).device))
    number = len(objective_of(distiller).pairs) - 1
    logits = [
        projector(outputs[f"{name}_features"][number])
        for name, projector in (("student", loss.student_projector), ("teacher", loss.teacher_projector))
    ]
    size = (padded.shape[2], padded.shape[3])
    ours, theirs = (at_label_size(each, size, image, loss.align_corners) for each in logits)
    reliability, _, weight = functional.hakd_maps(
        ours, theirs, label[None].to(ours.device), kmm=loss.kmm, kem=loss.kem, ignore_index=IGNORE_INDEX
    )
    return KnowledgeMaps(
        pictures.labelled_class_map(reliability[0].cpu(), label),
        pictures.labelled_class_map(weight[0].cpu(), label),
    )


def sample_pictures(
    distiller: Distiller,
    image: Tensor,
    label: Tensor,
    palette: Tensor,
    *,
    options: EvaluationConfig,
    align_corners: bool,
) -> tuple[list[tuple[str, Tensor]], KnowledgeMaps | None]:
    """Captioned uint8 [3, H, W] pictures of one sample, and its maps; teacher and maps where the run has them.

    The distiller is put into eval mode and back.
    """
    training, teacher = distiller.training, distiller.teacher
    distiller.eval()
    shown = denormalize(image)
    captioned = [("input", shown), ("label", pictures.colorize(label, palette))]
    if teacher is not None:
        prediction = predict(teacher, image, options, align_corners=align_corners).cpu()
        captioned.append(("teacher", pictures.overlay(shown, prediction, palette)))
    prediction = predict(distiller.student, image, options, align_corners=align_corners).cpu()
    captioned.append(("prediction" if teacher is None else "student", pictures.overlay(shown, prediction, palette)))
    maps = None
    if objective_of(distiller).pairs:
        maps = knowledge_maps(distiller, image, label)
        # Weights are small for many classes, and tiny for "spatial": show them relative to their largest, and say it.
        largest = max(float(maps.weight.nan_to_num().max()), 1e-12)
        captioned.append(("KMM reliability S, 0 to 1", pictures.heatmap(maps.reliability)))
        captioned.append((f"KEM weight W, 0 to {largest:.2g}", pictures.heatmap(maps.weight, maximum=largest)))
    distiller.train(training)
    return captioned, maps


def save_maps(path: Path, maps: KnowledgeMaps) -> None:
    """Both maps, thinned out to a width of MAP_WIDTH at most, float32 arrays by their names in one .npz."""
    step = -(-maps.reliability.shape[1] // MAP_WIDTH)
    with atomic_file(path) as file:
        np.savez_compressed(file, **{name: values[::step, ::step].numpy() for name, values in maps._asdict().items()})


def load_maps(path: Path) -> KnowledgeMaps:
    """What `save_maps` wrote. Raises ValueError, naming the file, where it is something else."""
    try:
        with np.load(path) as arrays:
            return KnowledgeMaps(*(torch.from_numpy(arrays[name]) for name in KnowledgeMaps._fields))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file of maps: {error}") from error
