"""Inputs of the operators, and what they compute from them: loss, terms and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
Results = dict[str, Tensor]
IGNORED = 255
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element off any boundary that loads could be aligned to."""
    return F.pad(x.flatten(), (1, 0))[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: F.pad(x, (2, 1))[..., 2:-1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": misaligned,
}


@dataclass(frozen=True)
class Problem:
    """One call of an operator. ``grids``: of student, teacher and labels; ``channels`` of both networks' features where
    the operator takes features. ``wanted``: "all" gradients, those of the "student" alone, of what is "learned" (the
    teacher's projection as well), or "none"."""

    loss: str  # "hakd_loss", "segmentation_loss" or "projected_hakd_loss"
    batch: int
    classes: int
    grids: tuple[Size, Size, Size]
    channels: tuple[int, int] = (0, 0)
    kind: str = "randn"  # "trained": N(+-10, 4), the labelled class high; "huge": to 1e4
    dtypes: tuple[str, str] = ("float32", "float32")  # of student and teacher
    weight_dtype: str = "float32"
    label_dtype: str = "int64"
    layout: str = "contiguous"
    bias: tuple[bool, bool] = (False, False)
    weighted: bool = False  # class weights
    with_teacher: bool = True
    normalizer: tuple[str, ...] = ()  # terms that get a divisor
    wanted: str = "all"
    spread: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def make_labels(batch: int, classes: int, size: Size, generator: torch.Generator, block: int = 5) -> Tensor:
    """int64 [B, H, W]: blocks of one class, a tenth of the pixels ignored. 255 is no class's label, even of more."""
    where = generator.device
    shape = (batch, -(-size[0] // block), -(-size[1] // block))
    coarse = torch.randint(0, classes, shape, generator=generator, device=where)
    labels = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : size[0], : size[1]].contiguous()
    ignored = torch.rand(labels.shape, generator=generator, device=where) < 0.1
    ignored[:, 0, 0] = False  # a pixel at least
    return labels.masked_fill(labels == IGNORED, 0).masked_fill(ignored, IGNORED)


def make_logits(shape: Sequence[int], labels: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    z = torch.randn(tuple(shape), generator=generator, device=generator.device)
    if kind == "huge":
        return (z * 4000).clamp(-1e4, 1e4)
    if kind == "randn":
        return z * 3
    nearest = F.interpolate(labels[:, None].float(), tuple(shape[2:])).long()
    return (z * 2 - 10).scatter_add_(1, nearest.clamp(max=shape[1] - 1), torch.full_like(nearest, 20, dtype=z.dtype))


@dataclass
class Inputs:
    """``leaves`` by name may get gradients; ``labels`` and ``fixed`` (keyword arguments) are constants."""

    leaves: dict[str, Tensor]
    labels: Tensor
    fixed: dict[str, Any]


def make_inputs(
    problem: Problem, device: torch.device, seed: int = 0, generator: torch.Generator | None = None
) -> Inputs:
    """Drawn on the CPU, so that they are the same everywhere, or where ``generator`` is."""
    p = problem
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    where = generator.device
    labels = make_labels(p.batch, p.classes, p.grids[2], generator, block=max(2, p.grids[2][0] // 8))

    def place(x: Tensor, dtype: str, layout: str = "contiguous") -> Tensor:
        return LAYOUTS[layout](x.to(device, DTYPES[dtype]))

    leaves: dict[str, Tensor] = {}
    for i, network in enumerate(("student", "teacher")):
        if p.loss == "projected_hakd_loss":
            c = p.channels[i]
            features = torch.randn(p.batch, c, *p.grids[i], generator=generator, device=where)
            leaves[f"{network}_features"] = place(features, p.dtypes[i], p.layout)
            weight = torch.randn(p.classes, c, generator=generator, device=where) * (p.spread / c**0.5)
            leaves[f"{network}_weight"] = place(weight, p.weight_dtype)
            bias = torch.randn(p.classes, generator=generator, device=where)
            if p.bias[i]:
                leaves[f"{network}_bias"] = place(bias, p.weight_dtype)
        elif p.with_teacher or i == 0:
            logits = make_logits((p.batch, p.classes, *p.grids[i]), labels, p.kind, generator)
            leaves[f"{network}_logits"] = place(logits, p.dtypes[i], p.layout)
    fixed: dict[str, Any] = {}
    if p.weighted:
        fixed["class_weight"] = torch.linspace(0.5, 2.0, p.classes).to(device)
    if p.normalizer:
        divisors = (torch.tensor(17), torch.tensor(18.5))
        fixed["normalizer"] = {term: d.to(device) for term, d in zip(p.normalizer, divisors, strict=False)}
    moved = labels.to(device, getattr(torch, p.label_dtype))
    if p.layout != "contiguous":
        moved = moved.mT.contiguous().mT if p.layout in ("transposed", "channels_last") else misaligned(moved)
    return Inputs(leaves, moved, fixed)


def call(function: Callable, problem: Problem, leaves: Mapping[str, Tensor], inputs: Inputs, **extra: Any) -> Any:
    """``function``, one of the public losses or their reference, on ``leaves``."""
    p, options = problem, {**problem.options, **inputs.fixed, **extra}
    if p.loss == "segmentation_loss":
        return function(leaves["student_logits"], inputs.labels, leaves.get("teacher_logits"), **options)
    if p.loss == "hakd_loss":
        return function(leaves["student_logits"], leaves["teacher_logits"], inputs.labels, **options)
    features = [leaves[f"{n}_{what}"] for what in ("features", "weight") for n in ("student", "teacher")]
    biases = {f"{n}_bias": leaves.get(f"{n}_bias") for n in ("student", "teacher")}
    return function(*features, inputs.labels, **biases, **options)


def wants(problem: Problem, name: str) -> bool:
    """Whether a leaf gets a gradient; the segmentation loss's teacher never does."""
    if problem.wanted == "none" or (problem.loss == "segmentation_loss" and name.startswith("teacher")):
        return False
    learned = problem.wanted == "learned" and name.endswith(("weight", "bias"))
    return problem.wanted == "all" or learned or name.startswith("student")


def upstream_like(loss: Tensor, even: bool = False) -> Tensor:
    """An incoming gradient as a loss scaler's, uneven over pixels."""
    if loss.dim() == 0 or even:
        return torch.full_like(loss, 256.0)
    values = torch.linspace(-256, 384, max(loss.numel(), 1), device=loss.device, dtype=loss.dtype)
    return values[: loss.numel()].view_as(loss)


def run(
    function: Callable, problem: Problem, inputs: Inputs, dtype: torch.dtype | None = None, even: bool = False,
    **extra: Any,
) -> Results:  # fmt: skip
    """Loss, unweighted terms and gradients, in ``dtype`` (None: in those that the inputs have), of an incoming gradient
    that is uneven over pixels, or ``even``."""
    leaves = {}
    for name, x in inputs.leaves.items():
        leaf = x.detach() if dtype is None else x.detach().to(dtype)
        leaves[name] = leaf.requires_grad_() if wants(problem, name) else leaf
    out = call(function, problem, leaves, inputs, return_terms=True, **extra)
    results = {k: v.detach() for k, v in out._asdict().items()}
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if wanted:
        gradients = torch.autograd.grad(out.loss, [leaves[n] for n in wanted], upstream_like(out.loss, even))
        results |= {f"d {n}": g for n, g in zip(wanted, gradients, strict=True)}
    return results
