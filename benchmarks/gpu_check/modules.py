"""``HeteroAKDLoss`` as it is trained, against the same module in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from . import compare
from .calls import EQUAL, GRIDS, Module, make_module, module_inputs, run_module
from .case import LIMITS, Case, Data
from .device import Device
from .problems import DTYPES, LAYOUTS, Results

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


@dataclass(frozen=True)
class Projector:
    """``PixelProjector`` alone; ``mean`` of the features, whose deviation is 1."""

    projector: str
    training: bool = True
    layout: str = "contiguous"
    dtype: str = "float32"
    mean: float = 0.5
    classes: int = 19


PROJECTORS = {
    "conv": Projector("conv", layout="transposed"),
    "conv_bn": Projector("conv_bn"),
    "conv_bn, eval, channels_last": Projector("conv_bn", False, "channels_last", "float16"),
    "conv_bn_relu, bfloat16, channels_last": Projector("conv_bn_relu", True, "channels_last", "bfloat16"),
    "conv_bn, mean 100": Projector("conv_bn", layout="sliced", mean=100.0),
    "conv_bn, K=150": Projector("conv_bn", layout="misaligned", classes=150),
    "conv_bn, K=300": Projector("conv_bn", classes=300),  # in chunks
}


def run_projector(module: torch.nn.Module, features: torch.Tensor) -> Results:
    features = features.detach().requires_grad_()
    y = module(features)
    leaves = {"features": features, **dict(module.named_parameters())}
    upstream = torch.linspace(-1.0, 1.5, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    buffers = {k: b.detach().clone() for k, b in module.named_buffers() if b.is_floating_point()}
    return {"y": y.detach(), **{f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}, **buffers}


def check_projector(p: Projector, backend: str, device: Device) -> Data:
    from hetero_kernels import PixelProjector

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((2, 140, 23, 31), generator=generator) + p.mean
    features = LAYOUTS[p.layout](drawn.to(device.device, DTYPES[p.dtype]))

    def make(backend: str) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return PixelProjector(140, p.classes, p.projector, backend=backend).to(device.device).train(p.training)

    exact = run_projector(make("reference").double(), features.double())
    eager, ours = (run_projector(make(b), features) for b in ("reference", device.backend(backend)))
    return compare.judge(ours, eager, exact)


def projector_cases(backend: str) -> list[Case]:
    return [
        Case(f"{backend}/PixelProjector {name}", functools.partial(check_projector, p, backend), backend,
             rehearse=backend == "cuda", limit=LIMITS[backend])
        for name, p in PROJECTORS.items()
    ]  # fmt: skip


def cases(backend: str) -> list[Case]:
    return projector_cases(backend) + [
        Case(f"{backend}/HeteroAKDLoss {name}", functools.partial(check, module, backend), backend,
             rehearse=backend == "cuda", limit=LIMITS[backend])
        for name, module in modules().items()
    ]  # fmt: skip
