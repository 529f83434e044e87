"""Loss, terms, maps and gradients of every operator against float64: every two options together, shapes, classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..covering import pairwise
from . import compare
from .case import LIMITS, Case, Data
from .device import Device
from .problems import LAYOUTS, Problem

# Two images so that images, bands of unequal rows and a last tile that is not full are met. Grids of student, teacher
# and labels.
GRIDS = {
    "stride 4": ((9, 12), (9, 12), (36, 48)),
    "mixed strides": ((8, 11), (4, 5), (33, 47)),
    "same grid": ((17, 23), (17, 23), (17, 23)),
    "downsampled": ((20, 31), (10, 9), (11, 13)),
}
SAME_FEATURES = {"same grid": GRIDS["same grid"], "stride 4": GRIDS["stride 4"]}
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"))
COMMON: dict[str, tuple] = {
    "grids": tuple(GRIDS),
    "layout": tuple(LAYOUTS),
    "dtypes": DTYPES,
    "label_dtype": ("int64", "int32", "uint8"),
    "kind": ("randn", "trained"),
    "reduction": ("mean", "sum", "none"),
    "align_corners": (False, True),
}
HAKD = {
    **COMMON,
    "temperature": (1.0, 2.0, 4.0, 1.5),
    "kmm": (True, False),
    "kem": ("class", "spatial", "none"),
    "divergence": ("kl", "ce"),
    "resolution": ("label", "feature"),
    "proj_weight": (0.0, 0.7),
    "normalizer": ((), ("hakd",), ("proj",), ("hakd", "proj")),
    "wanted": ("all", "student", "none"),
}
SEGMENTATION = {
    **COMMON,
    "temperature": (1.0, 2.0, 1.5),
    "kd_weight": (0.4, 0.0),
    "label_smoothing": (0.0, 0.1),
    "weighted": (False, True),
    "with_teacher": (True, False),
    "normalizer": ((), ("task",), ("kd",), ("task", "kd")),
    "wanted": ("all", "none"),
}
PROJECTED = {
    "grids": tuple(SAME_FEATURES),
    "layout": tuple(LAYOUTS),
    "dtypes": DTYPES,
    "weight_dtype": ("float32", "bfloat16"),
    "label_dtype": ("int64", "int32", "uint8"),
    "reduction": ("mean", "sum", "none"),
    "temperature": (1.0, 2.0, 4.0, 1.5),
    "kmm": (True, False),
    "kem": ("class", "none"),
    "divergence": ("kl", "ce"),
    "proj_weight": (0.0, 0.7),
    "bias": ((False, False), (True, True), (True, False)),
    "normalizer": ((), ("hakd",), ("proj",), ("hakd", "proj")),
    "wanted": ("all", "student", "none"),
}
OPTIONS = ("reduction", "align_corners", "temperature", "kmm", "kem", "divergence", "resolution", "proj_weight",
           "kd_weight", "label_smoothing")  # fmt: skip

# Around what a thread, a warp, a block of classes and the tables' entries hold. Triton compiles each for itself.
CLASSES = {
    "cuda": (1, 2, 19, 20, 21, 32, 33, 96, 97, 150, 192, 193, 600, 1000),
    "triton": (1, 2, 19, 32, 33, 97, 150, 193, 1000),
}
SHAPES = {
    "non-integer": ((13, 9), (7, 17), (61, 50)),
    "stride 2": ((10, 40), (20, 80), (20, 80)),
    "one pixel": ((1, 1), (1, 1), (1, 1)),
    "one coarse pixel": ((1, 1), (1, 1), (20, 9)),
    "one row": ((1, 40), (1, 10), (1, 320)),
    "one column": ((70, 1), (70, 1), (70, 1)),
    "tall bands": ((2, 2), (2, 2), (140, 3)),
    "a crop": ((64, 128), (32, 64), (512, 1024)),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "hakd_loss": {"temperature": 2.0},
    "segmentation_loss": {"temperature": 2.0, "kd_weight": 0.4},
    "projected_hakd_loss": {"temperature": 2.0, "resolution": "feature"},
}
SHORT = {"hakd_loss": "hakd", "segmentation_loss": "segmentation", "projected_hakd_loss": "projected"}


def _problem(loss: str, chosen: dict[str, Any]) -> Problem:
    options = {k: v for k, v in chosen.items() if k in OPTIONS}
    if loss == "projected_hakd_loss":
        options["resolution"] = "feature"
    rest = {k: v for k, v in chosen.items() if k not in OPTIONS and k != "grids"}
    channels = (23, 41) if loss == "projected_hakd_loss" else (0, 0)
    return Problem(loss, 2, 3, GRIDS[chosen["grids"]], channels, options=options, **rest)


def describe(chosen: dict[str, Any]) -> str:
    """The options in a few words, for a case's name."""
    words = []
    for name, value in chosen.items():
        if isinstance(value, bool):
            words += [name] if value else []
        elif isinstance(value, tuple):
            words += ["+".join(map(str, value))] if value else []
        else:
            words.append(f"{name}={value:g}" if isinstance(value, float) else str(value))
    return " ".join(words)


def problems(backend: str) -> Iterator[tuple[str, Problem]]:
    """Name and problem."""
    every: dict[str, dict[str, tuple]] = {
        "hakd_loss": HAKD, "segmentation_loss": SEGMENTATION, "projected_hakd_loss": PROJECTED,
    }  # fmt: skip
    for loss, values in every.items():
        for i, chosen in enumerate(pairwise(values)):
            yield f"{SHORT[loss]} options {i:02d}: {describe(chosen)}", _problem(loss, chosen)
    for loss, options in DEFAULTS.items():
        channels = (40, 72) if loss == "projected_hakd_loss" else (0, 0)
        base = Problem(loss, 2, 19, GRIDS["stride 4"], channels, options=options, bias=(True, True))
        supervised = {} if loss == "segmentation_loss" else {"proj_weight": 0.7}
        for classes in CLASSES[backend]:
            problem = replace(base, classes=classes, options={**options, **supervised})
            yield f"{SHORT[loss]} K={classes}", problem
            if supervised and classes in (19, 150):  # the functions' default
                yield f"{SHORT[loss]} K={classes} proj_weight=0", replace(problem, options=options)
        for name, grids in SHAPES.items():
            if loss == "projected_hakd_loss" and grids[0] != grids[1]:
                continue
            yield f"{SHORT[loss]} {name}", replace(base, classes=7, grids=grids, options={**options, **supervised})
        if loss != "projected_hakd_loss":
            for kem in ("class", "none") if loss == "hakd_loss" else ("",):
                huge = replace(base, classes=7, kind="huge", options={**options, **({"kem": kem} if kem else {})})
                yield f"{SHORT[loss]} logits to 1e4 {kem}".rstrip(), huge
            for temperature in (1.0, 2.0, 4.0):
                sure = replace(base, kind="trained", options={**options, "temperature": temperature})
                yield f"{SHORT[loss]} trained, T={temperature:g}", sure
    # Features are not read once: other grids, other resolutions.
    for resolution, kem in (("label", "class"), ("feature", "class"), ("feature", "spatial")):
        options = {"temperature": 2.0, "proj_weight": 0.7, "resolution": resolution, "kem": kem}
        grids = GRIDS["stride 4" if kem == "spatial" else "mixed strides"]
        problem = Problem("projected_hakd_loss", 2, 19, grids, (40, 72), bias=(True, True), options=options)
        yield f"projected apart, {resolution} {kem}", problem


# Small enough for Triton's interpreter. The CPU's kernels, in the place of CUDA's, run everything.
INTERPRETED = ("hakd one pixel", "segmentation one pixel", "projected one pixel")


def check_maps(device: Device) -> Data:
    """``hakd_maps``, which the reference computes on any device, in float32 against float64."""
    from hetero_kernels import functional

    from .problems import make_inputs

    found = {}
    for kem in ("class", "spatial"):
        inputs = make_inputs(Problem("hakd_loss", 2, 5, GRIDS["mixed strides"]), device.device)
        student, teacher = inputs.leaves.values()
        names = ("reliability", "hybrid", "weight")
        plain = functional.hakd_maps(student, teacher, inputs.labels, kem=kem)
        exact = functional.hakd_maps(student.double(), teacher.double(), inputs.labels, kem=kem)
        mine = dict(zip(names, plain, strict=True))
        found[kem] = compare.judge(mine, mine, dict(zip(names, exact, strict=True)))
    return {"detail": "; ".join(f"{k}: {v['detail']}" for k, v in found.items()), **found}


def default_precision(backend: str, device: Device) -> Data:
    """With torch's own settings: the projections that torch runs must be float32 all the same."""
    options = {"temperature": 2.0, "proj_weight": 0.7}
    problem = Problem("projected_hakd_loss", 2, 19, GRIDS["mixed strides"], (256, 512), bias=(True, True),
                      options=options)  # fmt: skip
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    try:
        return compare.check(problem, backend, device)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def cases(backend: str) -> list[Case]:
    found = [
        Case(
            f"{backend}/{name}", functools.partial(compare.check, problem, backend), backend,
            rehearse=backend == "cuda" or name.split(":")[0] in INTERPRETED, limit=LIMITS[backend],
        )
        for name, problem in problems(backend)
    ]  # fmt: skip
    settings = functools.partial(default_precision, backend)
    name = f"{backend}/projected with torch's precision settings"
    found.append(Case(name, settings, backend, backend == "cuda", LIMITS[backend]))
    return found
