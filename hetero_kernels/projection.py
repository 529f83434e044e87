"""A projector's layers as the kernels take them: raw logits, and a scale and shift per class with or without ReLU.

The features go through the operator ``project``. What is here is K-sized: batch statistics or running ones become scale
and shift, and a forward in training mode updates the buffers, as ``torch.nn.BatchNorm2d`` does; its backward never.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .ops import backends
from .ops import projection as ops
from .ops.library import compute_dtype
from .reference import autocast_dtype, convolve, savable, without_autocast

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)  # any other type may compute in a way of its own


class Projected(NamedTuple):
    """Raw logits z [B, K, h, w] and what they mean: ``scale z + shift`` (both [K]), then ReLU if ``relu``."""

    logits: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool

    def normalized(self, dtype: torch.dtype) -> Tensor:
        """The logits that are meant."""
        return _Normalize.apply(*self).to(dtype)


class _Normalize(torch.autograd.Function):
    """In whose gradients a pixel without one counts exactly 0, whatever its logit: 0 * NaN would be NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
        y = torch.addcmul(shift[:, None, None], logits, scale[:, None, None])
        return torch.relu(y) if relu else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.relu = inputs[3]
        ctx.save_for_backward(*inputs[:2], *([output] if ctx.relu else []))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, scale, *y = ctx.saved_tensors
        if y:
            gradient = torch.where(y[0] <= 0, 0.0, gradient)
        reached = gradient != 0
        return (
            torch.where(reached, gradient * scale[:, None, None], 0.0),
            torch.where(reached, gradient * logits, 0.0).sum((0, 2, 3)),
            gradient.sum((0, 2, 3)),
            None,
        )


class Layers(NamedTuple):
    """A projector that is a 1x1 convolution, then perhaps a batch norm, then perhaps ReLU, and nothing else."""

    convolution: nn.Conv2d
    norm: Any  # nn.BatchNorm2d, nn.SyncBatchNorm or None
    relu: bool


def uses_the_batch(norm: Any) -> bool:
    """Whether a batch norm takes the batch's own statistics."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _globally_hooked() -> bool:
    m = nn.modules.module
    return bool(
        m._global_forward_hooks or m._global_forward_pre_hooks
        or m._global_backward_hooks or m._global_backward_pre_hooks
    )  # fmt: skip


def is_changed(module: nn.Module) -> bool:
    """Whether a call of ``module`` is more than its class's forward: hooks (global ones too), another forward."""
    return _globally_hooked() or _changed(module) is not None


def _changed(module: nn.Module) -> str | None:
    """What about ``module``, of a known type, the kernels would pass by."""
    if _has_hooks(module):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has another forward"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in _PLAIN:
            return f"has a {name} of type {type(tensor).__name__}"
    return None


def not_plain(layer: object) -> str | None:
    """Why a projector's first layer is no 1x1 convolution that others can run; None where it is one."""
    if _globally_hooked():
        return "all modules have hooks"
    if type(layer) is not nn.Conv2d:
        return f"its first layer is a {type(layer).__name__}, expected Conv2d"
    if (layer.kernel_size, layer.stride, layer.padding, layer.groups) != ((1, 1), (1, 1), (0, 0), 1):
        return "its convolution is not a plain 1x1 one"
    problem = _changed(layer)
    return f"its Conv2d {problem}" if problem else None


def children_of(projector: nn.Module) -> list[Any]:
    """A projector's layers: those of a Sequential, or a convolution that is all of it."""
    return list(projector) if isinstance(projector, nn.Sequential) else [projector]


def layers_of(projector: nn.Module) -> tuple[Layers | None, str]:
    """The projector's layers, or None and why torch has to run them."""
    children = children_of(projector)
    conv: Any = children[0] if children else None
    if problem := not_plain(conv):
        return None, problem
    rest = children[1:]
    norm: Any = rest.pop(0) if rest and type(rest[0]) in (nn.BatchNorm2d, nn.SyncBatchNorm) else None
    relu = bool(rest) and type(rest[0]) is nn.ReLU
    rest = rest[relu:]
    if rest:
        return None, f"it has a {type(rest[0]).__name__}"
    if norm is not None and norm.num_features != conv.out_channels:
        return None, f"its batch norm is of {norm.num_features} classes, its convolution of {conv.out_channels}"
    if norm is not None and (norm.running_mean is None) != (norm.running_var is None):
        return None, "its batch norm has one of two running statistics"
    for child in children[1:]:
        if problem := _changed(child):
            return None, f"its {type(child).__name__} {problem}"
    return Layers(conv, norm, relu), ""


def ours(projector: nn.Module, features: Tensor, backend: str | None) -> tuple[Layers, str] | None:
    """The layers of ``projector``, and the backend that can run them on ``features``; None where none can. Says once
    why torch has to where the backend could."""
    chosen = backends.select_among(ops.able(), backend, str(features.device))
    if chosen not in ops.able():
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return None  # torch's layers have every kind of derivative
    layers, reason = layers_of(projector)
    if layers is None and not compiling:  # a warning would break the graph
        backends.warn_once(
            f"hetero_kernels leaves a projector to torch, which takes more time and memory: {reason}.", stacklevel=5
        )
    if layers is None:
        return None
    double = compute_dtype(features, *layers.convolution.parameters()) == torch.float64
    return None if double and chosen != "cpu" else (layers, chosen)  # GPU kernels compute in float32


def run(projector: nn.Module, features: Tensor, backend: str | None) -> Projected | Tensor:
    """Raw logits and what they mean, where the kernels can run the layers; else torch's logits."""
    if found := ours(projector, features, backend):
        return project(*found, features)
    head, dtype = convolution_of(projector), dtype_of(features, children_of(projector)[0].weight)
    if head is None:
        forward = nn.Sequential.forward if isinstance(projector, nn.Sequential) else nn.Conv2d.forward
        return forward(projector, savable(features).to(dtype))  # type: ignore[arg-type]
    logits = convolve(features, head.weight.flatten(1), head.bias, dtype)
    for layer in head.rest:
        logits = layer(logits)
    return logits


def dtype_of(features: Tensor, weight: Tensor) -> torch.dtype:
    """Of their projection, as torch has it."""
    region = autocast_dtype(features.device.type)
    if region is not None and torch.float64 not in (features.dtype, weight.dtype):
        return region
    return torch.promote_types(features.dtype, weight.dtype)


def is_batch_norm(module: object) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


class Convolution(NamedTuple):
    """A projector as a 1x1 convolution and what follows."""

    weight: Tensor  # [K, C, 1, 1]
    bias: Tensor | None  # [K]
    rest: list[nn.Module]


def convolution_of(projector: nn.Module) -> Convolution | None:
    """The 1x1 convolution that ``projector`` begins with, a batch norm in eval mode folded in; None where it does not
    begin with one, or not surely: other layers, hooks."""
    conv: Any
    conv, *rest = children_of(projector)
    if not_plain(conv):
        return None
    weight, bias = conv.weight, conv.bias
    norm: Any = rest[0] if rest else None
    if not is_batch_norm(norm) or uses_the_batch(norm) or is_changed(norm):
        return Convolution(weight, bias, rest)
    if norm.num_features != conv.out_channels:  # torch says so
        return Convolution(weight, bias, rest)
    scale, shift = running_normalization(norm, bias)
    return Convolution(weight * scale.to(weight.dtype)[:, None, None, None], shift.to(weight.dtype), rest[1:])


def rounding_of(features: Tensor, weight: Tensor) -> str:
    """What ``torch.autocast`` rounds both to where this is called."""
    region = autocast_dtype(features.device.type)
    if region is None or torch.float64 in (features.dtype, weight.dtype):
        return "none"
    return ops.ROUNDINGS.get(region, "none")


def project(layers: Layers, backend: str, features: Tensor) -> Projected:
    """Features [B, C, h, w] through the layers, whose buffers are updated as in torch's own forward; by what
    :func:`ours` gave."""
    conv, norm, relu = layers
    rounding = rounding_of(features, conv.weight)
    with without_autocast(features.device.type):
        batch = norm is not None and uses_the_batch(norm)
        group = _group(norm) if batch else None
        if batch:
            _count_batch(norm, features, group)
        empty = features.shape[0] == 0 and group is None
        logits, _, statistics = ops.project(
            savable(features), savable(conv.weight.flatten(1)), batch and not empty, rounding, backend
        )
        if batch and empty:  # nothing to measure
            scale, shift = _affine(norm, logits.new_ones(logits.shape[1], dtype=torch.float64), None)
        elif batch:
            scale, shift = _batch_normalization(norm, conv.bias, statistics, group)
            if conv.bias is not None:  # which the mean takes out again: its gradient is 0
                shift = shift + (conv.bias - conv.bias).double()
        elif norm is not None:
            scale, shift = running_normalization(norm, conv.bias)
        else:
            scale = torch.ones(logits.shape[1], dtype=logits.dtype, device=logits.device)
            shift = torch.zeros_like(scale) if conv.bias is None else conv.bias
        return Projected(logits, scale.to(logits.dtype), shift.to(logits.dtype), relu)


def _group(norm: Any) -> Any:
    """The processes that share their statistics, or None."""
    if type(norm) is not nn.SyncBatchNorm or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Joint(torch.autograd.Function):
    """Mean and sum of squared differences over all processes from a process's own, added up in the order of ranks; and
    the number of pixels."""

    @staticmethod
    def forward(ctx: Any, count: Tensor, mean: Tensor, squares: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        from torch.distributed import _functional_collectives as funcol  # not in every build of torch

        own = torch.stack((count, mean, squares))
        parts = funcol.wait_tensor(funcol.all_gather_tensor(own, 0, group)).unflatten(0, (-1, 3))
        counts, means, each = parts.unbind(1)
        total = counts.sum(0)
        joint = (counts * means).sum(0) / total
        ctx.group = group
        ctx.save_for_backward(count, mean, total, joint)
        ctx.mark_non_differentiable(total)
        return total, joint, (each + counts * (means - joint).square()).sum(0)

    @staticmethod
    def backward(ctx: Any, _: object, by_mean: Tensor, by_squares: Tensor) -> tuple[Tensor | None, ...]:
        from torch.distributed import _functional_collectives as funcol

        count, mean, total, joint = ctx.saved_tensors
        sums = torch.stack((by_mean, by_squares))
        by_mean, by_squares = funcol.wait_tensor(funcol.all_reduce(sums, "sum", ctx.group)).unbind()
        return None, count / total * by_mean + 2 * count * (mean - joint) * by_squares, by_squares, None


def _count_batch(norm: Any, features: Tensor, group: Any) -> None:
    """Counts it, and refuses what torch refuses then."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if features.shape[0] * features.shape[2] * features.shape[3] == 1 and group is None:
        size = [1, norm.num_features, 1, 1]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if norm.eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {norm.eps}")


def _affine(norm: Any, scale: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``scale (z - mean)``, the affine parameters applied."""
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    shift = torch.zeros_like(scale) if mean is None else -mean * scale
    return scale, shift if norm.bias is None else norm.bias.double() + shift


def _batch_normalization(norm: Any, bias: Tensor | None, statistics: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    count, mean, squares, offset = statistics.unbind()
    if group is not None:  # every process subtracted a pilot of its own
        count, mean, squares = _Joint.apply(count, mean + offset, squares, group)
        mean = mean - offset
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            total = mean + offset if bias is None else mean + offset + bias.double()
            _update(norm, total, squares / (count - 1))
    return _affine(norm, torch.rsqrt(squares / count + norm.eps), mean)


def _update(norm: Any, mean: Tensor, variance: Tensor) -> None:
    momentum = norm.momentum
    if momentum is None:  # the mean of all batches
        momentum = 0.0 if norm.num_batches_tracked is None else 1.0 / norm.num_batches_tracked.double()
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        if buffer is not None:
            wide = buffer.double()
            buffer.copy_(wide * (1 - momentum) + value * momentum)  # as torch writes it: infinity stays one


def running_normalization(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64, of a batch norm in eval mode after a convolution with ``bias``."""
    mean = norm.running_mean.double()
    if bias is not None:
        mean = mean - bias.double()
    return _affine(norm, torch.rsqrt(norm.running_var.double() + norm.eps), mean)
