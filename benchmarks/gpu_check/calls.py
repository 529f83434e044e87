"""Every operator in a few calls, forward and backward: what streams, graphs, sanitizers and profilers are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .problems import DTYPES, Problem, Results, make_inputs, make_labels, make_logits, run

GRIDS = ((9, 12), (5, 7), (36, 50))
EQUAL = ((9, 12), (9, 12), (36, 48))
T2: dict[str, Any] = {"temperature": 2.0}
FEATURE: dict[str, Any] = {**T2, "resolution": "feature"}


@dataclass(frozen=True)
class Module:
    """``HeteroAKDLoss`` with logits of both networks. ``autocast``: dtype of the region."""

    projector: str = "conv_bn"
    training: bool = True
    resolution: str = "label"
    grids: tuple = GRIDS
    autocast: str | None = None
    batch: int = 2
    classes: int = 7
    channels: tuple[int, int] = (24, 40)
    dtype: str = "float32"  # of features and logits


PROBLEMS: dict[str, Problem] = {
    "hakd": Problem("hakd_loss", 2, 7, GRIDS, options=T2),
    "hakd none": Problem("hakd_loss", 2, 7, GRIDS, options={**T2, "reduction": "none", "proj_weight": 0.5}),
    "hakd spatial": Problem("hakd_loss", 2, 7, GRIDS, options={**T2, "kem": "spatial", "proj_weight": 0.5}),
    "hakd feature": Problem("hakd_loss", 2, 7, GRIDS, options=FEATURE),
    "hakd one divisor given": Problem(
        "hakd_loss", 2, 7, GRIDS, options={**T2, "proj_weight": 0.5}, normalizer=("proj",)
    ),
    "hakd K=150": Problem("hakd_loss", 1, 150, GRIDS, options={**T2, "proj_weight": 0.5}),
    "hakd K=300": Problem("hakd_loss", 1, 300, GRIDS, options=T2),
    "segmentation": Problem("segmentation_loss", 2, 7, GRIDS),
    "segmentation weighted": Problem("segmentation_loss", 2, 7, GRIDS, weighted=True, normalizer=("kd",),
                                     options={"label_smoothing": 0.1}),
    "segmentation none": Problem("segmentation_loss", 2, 7, GRIDS, options={"reduction": "none"}),
    "projected": Problem("projected_hakd_loss", 2, 7, EQUAL, (24, 40), bias=(True, True),
                         options={**FEATURE, "proj_weight": 0.5}),
    "projected, proj_weight 0": Problem("projected_hakd_loss", 2, 7, EQUAL, (24, 40), options=FEATURE),
    "projected none": Problem("projected_hakd_loss", 2, 7, EQUAL, (24, 40), options={**FEATURE, "reduction": "none"}),
    "projected K=150": Problem("projected_hakd_loss", 1, 150, EQUAL, (24, 800), dtypes=("bfloat16", "bfloat16"),
                               options={**FEATURE, "proj_weight": 0.5}),
}  # fmt: skip
MODULES: dict[str, Module] = {
    "module conv_bn": Module(),
    "module conv_bn_relu, feature resolution": Module("conv_bn_relu", resolution="feature"),
    "module conv, eval, feature resolution": Module("conv", False, "feature", EQUAL),
    "module conv_bn, autocast": Module(autocast="bfloat16"),
}
CALLS: dict[str, Problem | Module] = {**PROBLEMS, **MODULES}


def module_inputs(
    m: Module, device: torch.device, seed: int = 0, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """What its forward takes, features whose mean is not 0 among it; drawn as :func:`make_inputs` draws."""
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    labels = make_labels(m.batch, m.classes, m.grids[2], generator, block=max(2, m.grids[2][0] // 8))
    found: dict[str, torch.Tensor] = {}
    for i, network in enumerate(("student", "teacher")):
        shape = (m.batch, m.channels[i], *m.grids[i])
        features = torch.randn(shape, generator=generator, device=generator.device) + 0.5
        logits = make_logits((m.batch, m.classes, *m.grids[i]), labels, "randn", generator)
        found[f"{network}_features"], found[f"{network}_logits"] = (
            x.to(device, DTYPES[m.dtype]) for x in (features, logits)
        )  # fmt: skip
    return {**found, "labels": labels.to(device)}


def make_module(m: Module, device: torch.device, backend: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    from hetero_kernels import HeteroAKDLoss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = HeteroAKDLoss(*m.channels, m.classes, projector=m.projector, temperature=2.0, resolution=m.resolution,
                               backend=backend)  # fmt: skip
        for buffer in module.buffers():
            if buffer.is_floating_point():  # statistics that a run has left
                buffer.add_(torch.rand(buffer.shape) * 0.5)
    return module.to(device, dtype).train(m.training)


def run_module(
    module: torch.nn.Module, m: Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> Results:
    """Loss, terms, gradients of student features, logits and parameters, and the statistics afterwards."""
    given = {k: x if k == "labels" or dtype is None else x.to(dtype) for k, x in inputs.items()}
    for name in ("student_features", "student_logits"):
        given[name] = given[name].detach().requires_grad_()
    region = torch.autocast(
        given["labels"].device.type, DTYPES[m.autocast or "bfloat16"], enabled=bool(m.autocast and dtype is None)
    )  # fmt: skip
    with region:
        out = module(**given)
    learned = {k: p for k, p in module.named_parameters() if p.requires_grad}
    leaves = {**{k: given[k] for k in ("student_features", "student_logits")}, **learned}
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    statistics = {k: b.detach().clone() for k, b in module.named_buffers() if b.is_floating_point()}
    return {
        **{k: v.detach() for k, v in out._asdict().items()},
        **{f"d {k}": g for k, g in zip(leaves, gradients, strict=True)},
        **statistics,
    }


def make_step(name: str, device: torch.device, backend: str, seed: int = 0, **extra: Any) -> Callable[[], Results]:
    """The call ``name`` on inputs of its own: forward and backward."""
    from hetero_kernels import functional

    what = CALLS[name]
    if isinstance(what, Module):
        inputs, module = module_inputs(what, device, seed), make_module(what, device, backend)
        return lambda: run_module(module, what, inputs)
    given, function = make_inputs(what, device, seed), getattr(functional, what.loss)
    return lambda: run(function, what, given, backend=backend, **extra)
