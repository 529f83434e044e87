"""What all operators of ``torch.ops.hetero_kernels`` share.

Schemas, fakes and autograd are registered here in Python; the compiled libraries add kernels for their devices.
Operators take each tensor in the dtype it comes in and compute in float32 (float64), so they are registered as
fallthrough under autocast: a region changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "hetero_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str, schema: str, fake: Callable, setup_context: Callable, backward: Callable
) -> tuple[Callable, Callable]:
    """Defines ``hetero_kernels::name`` with its fake and its autograd formula.

    Returns the operator, and a function of the same arguments for those who want its gradient: in eager mode it has
    the same formula without the registered one's bookkeeping, a tenth of a millisecond for many arguments.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, torch.library.fallthrough_kernel, f"Autocast{device}")
    op = getattr(torch.ops.hetero_kernels, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

    Function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    Function.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiable(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return op(*args)
        return Function.apply(*args)

    return op, differentiable


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input has it, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def pack_scalars(*values: float) -> Tensor:
    """Weights and temperatures as one float64 CPU tensor: operators that took them as numbers would be
    recompiled for every new value."""
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64)
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=torch.float64)


# A saved gradient times the incoming one. An operator of its own because its autograd formula is where a second
# derivative is noticed: the saved gradient is a constant to autograd, which would otherwise return silent zeros.


def _scale(gradient: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    # The product is formed in float32 (float64): 1/N alone may underflow in float16.
    scaled = gradient if factor is None else gradient * factor.to(gradient.dtype)
    return scaled.to(like.dtype, copy=scaled is gradient)


def no_second_derivative(ctx: object, grad: Tensor) -> None:
    """Autograd formula of the operators that only backwards call."""
    raise RuntimeError(
        "hetero_kernels: second derivatives of the fused losses are not implemented "
        "(backward with create_graph=True was differentiated again); use backend='reference' for them"
    )


def no_context(ctx: object, inputs: tuple, output: Tensor) -> None:
    """Keeps nothing: :func:`no_second_derivative` needs nothing."""


scale_gradient_op, scale_gradient = define(
    "scale_gradient",
    "(Tensor gradient, Tensor? factor, Tensor like) -> Tensor",
    fake=lambda gradient, factor, like: torch.empty_like(gradient, dtype=like.dtype),
    setup_context=no_context,
    backward=no_second_derivative,
)
_library.impl("scale_gradient", _scale, "CompositeExplicitAutograd")
