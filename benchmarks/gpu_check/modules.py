"""``HeteroAKDLoss`` as it is trained, against the same module in float64."""

from __future__ import annotations

import functools
import itertools

import torch

from . import compare
from .calls import EQUAL, GRIDS, Module, make_module, module_inputs, run_module
from .case import LIMITS, Case, Data
from .device import Device

HALF = compare.BOUNDS[torch.bfloat16]


def check(m: Module, backend: str, device: Device) -> Data:
    inputs = module_inputs(m, device.device)
    exact = run_module(make_module(m, device.device, "reference", torch.float64), m, inputs, torch.float64)
    eager, ours = (
        run_module(make_module(m, device.device, b), m, inputs) for b in ("reference", device.backend(backend))
    )  # fmt: skip
    # Under autocast factors are rounded as the region says: float64 of the rounded inputs is not what is computed.
    return compare.judge(ours, eager, exact, least=HALF if m.autocast else 0.0)


def modules() -> dict[str, Module]:
    found = {}
    chosen = itertools.product(("conv", "conv_bn", "conv_bn_relu"), (True, False), ("label", "feature"))
    for projector, training, resolution in chosen:
        mode = "training" if training else "eval"
        grids = EQUAL if resolution == "feature" and not training else GRIDS
        found[f"{projector}, {mode}, {resolution}"] = Module(projector, training, resolution, grids)
    for projector in ("conv", "conv_bn", "conv_bn_relu"):
        found[f"{projector}, autocast bfloat16"] = Module(projector, autocast="bfloat16")
        found[f"{projector}, autocast float16, feature"] = Module(projector, resolution="feature", grids=EQUAL,
                                                                  autocast="float16")  # fmt: skip
    found["conv_bn, K=150"] = Module(classes=150, channels=(64, 300))
    return found


def cases(backend: str) -> list[Case]:
    return [
        Case(f"{backend}/HeteroAKDLoss {name}", functools.partial(check, module, backend), backend,
             rehearse=backend == "cuda", limit=LIMITS[backend])
        for name, module in modules().items()
    ]  # fmt: skip
