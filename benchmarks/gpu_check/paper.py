"""The sizes that are timed, tuned, profiled and predicted: the paper's, and what a step on them moves at least."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import compare
from .calls import FEATURE, T2, Module, make_module, module_inputs, run_module
from .case import LIMITS, Case, Data
from .device import Device
from .problems import Inputs, Problem, Results, make_inputs, run, wants

CITYSCAPES = ((64, 128), (64, 128), (512, 1024))
ADE20K = ((64, 64), (64, 64), (512, 512))
PROJECTED: dict[str, Any] = {**FEATURE, "proj_weight": 1.0}
SIZES: dict[str, Problem | Module] = {
    "hakd K=19": Problem("hakd_loss", 8, 19, CITYSCAPES, wanted="student", options=T2),
    "hakd K=19, feature resolution": Problem("hakd_loss", 8, 19, CITYSCAPES, wanted="student", options=FEATURE),
    "hakd K=150": Problem("hakd_loss", 16, 150, ADE20K, wanted="student", options=T2),
    "CE + KD K=19": Problem("segmentation_loss", 8, 19, CITYSCAPES),
    "CE K=19": Problem("segmentation_loss", 8, 19, CITYSCAPES, with_teacher=False),
    "CE + KD K=150": Problem("segmentation_loss", 16, 150, ADE20K),
    "projected K=19": Problem("projected_hakd_loss", 8, 19, ((16, 32), (16, 32), (512, 1024)), (256, 512),
                              bias=(True, True), wanted="learned", options=PROJECTED),
    "projected K=19, stride 8": Problem("projected_hakd_loss", 8, 19, CITYSCAPES, (256, 512), bias=(True, True),
                                        wanted="learned", options=PROJECTED),
    "projected K=150": Problem("projected_hakd_loss", 16, 150, ((16, 16), (16, 16), (512, 512)), (256, 512),
                               bias=(True, True), wanted="learned", options=PROJECTED),
    "whole loss, R101 -> R18, K=19": Module(grids=CITYSCAPES, batch=8, classes=19, channels=(512, 2048)),
}  # fmt: skip


def shrink(what: Problem | Module) -> Problem | Module:
    """The same on grids that a rehearsal has time for."""
    channels = min(what.channels[0], 12), min(what.channels[1], 12)
    grids = ((2, 3), (2, 3), (2, 3)) if what.grids[0] == what.grids[2] else ((2, 3), (2, 3), (4, 6))
    return replace(what, batch=1, classes=min(what.classes, 3), channels=channels, grids=grids)


def sized(name: str, dtype: str, device: Device) -> Problem | Module:
    """``SIZES[name]`` with features and logits of both networks in ``dtype``."""
    what = SIZES[name] if device.kind == "cuda" else shrink(SIZES[name])
    if isinstance(what, Module):
        return replace(what, dtype=dtype, autocast=None if dtype == "float32" else dtype)
    return replace(what, dtypes=(dtype, dtype))


def make_set(what: Problem | Module, device: Device, seed: int = 0) -> Any:
    """Inputs, drawn on the device: on the CPU it would take seconds."""
    generator = torch.Generator(device.device).manual_seed(seed)
    make: Callable = module_inputs if isinstance(what, Module) else make_inputs
    return make(what, device.device, generator=generator)


def make_step(what: Problem | Module, given: Any, provider: str, device: Device) -> Callable[[], Results]:
    """Forward and backward by a backend, by "reference" or by "compile" (torch.compile of the reference)."""
    from hetero_kernels import functional, reference

    backend = "reference" if provider == "compile" else device.backend(provider)
    if isinstance(what, Module):
        module: Any = make_module(what, device.device, backend)
        if provider == "compile":
            module.forward = torch.compile(module.forward, dynamic=False)
        return lambda: run_module(module, what, given)
    if backend == "reference":
        function = getattr(reference, what.loss)
        if provider == "compile":
            function = torch.compile(function, dynamic=False)
    else:
        function = functools.partial(getattr(functional, what.loss), backend=backend)
    return lambda: run(function, what, given)


def least_bytes(what: Problem | Module, given: Any) -> int:
    """Of every input read once and every gradient written once."""
    if isinstance(what, Module):
        moved = [*given.values(), given["student_features"], given["student_logits"]]
        return sum(x.numel() * x.element_size() for x in moved)
    moved = [*given.leaves.values(), *(x for n, x in given.leaves.items() if wants(what, n))]
    labels = given.labels.element_size() * given.labels.numel()
    if what.options.get("resolution") == "feature":  # sampled
        labels = given.labels.element_size() * what.batch * what.grids[0][0] * what.grids[0][1]
    return sum(x.numel() * x.element_size() for x in moved) + labels


def first_image(name: str, dtype: str, backend: str, device: Device) -> Data:
    """The first image's loss map and gradients at full size against float64, which has room for one."""
    from hetero_kernels import functional, reference

    what = sized(name, dtype, device)
    assert isinstance(what, Problem)
    what = replace(what, wanted="student", options={**what.options, "reduction": "none"})
    given = make_set(what, device)
    ours = run(functools.partial(getattr(functional, what.loss), backend=device.backend(backend)), what, given,
               even=True)  # fmt: skip
    leaves = {k: x[:1] if x.dim() == 4 else x for k, x in given.leaves.items()}
    one = Inputs(leaves, given.labels[:1], given.fixed)
    plain = getattr(reference, what.loss)
    eager = run(plain, what, one, even=True)
    exact = run(plain, what, one, torch.float64, even=True)
    shown = {k: x[:1] if x.dim() > 2 else x for k, x in ours.items() if not k.endswith(("weight", "bias"))}
    data = compare.judge(shown, eager, {k: exact[k] for k in shown})
    make_step(sized(name, dtype, device), given, backend, device)()  # compiles what will be timed
    return data


def compile_whole(name: str, dtype: str, backend: str, device: Device) -> Data:
    """What will be timed runs at full size, to finite numbers."""
    what = sized(name, dtype, device)
    results = make_step(what, make_set(what, device), backend, device)()
    wrong = [k for k, x in results.items() if not x.isfinite().all()]
    assert not wrong, f"{', '.join(wrong)} are not finite"
    return {"loss": float(results["loss"])}


def cases(backend: str) -> list[Case]:
    found = []
    for name, what in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            run_one = compile_whole if isinstance(what, Module) else first_image
            found.append(Case(f"{backend}/full size {name}, {dtype}", functools.partial(run_one, name, dtype, backend),
                              backend, rehearse=backend == "cuda", limit=LIMITS[backend]))  # fmt: skip
    return found
