"""What all operators of ``torch.ops.hetero_kernels`` share.

Schemas, fakes and autograd are registered here in Python; the compiled libraries add kernels for their devices.
Operators take each tensor in the dtype it comes in and compute in float32 (float64), so they are registered as
fallthrough under autocast: a region changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Marked = TypeVar("Marked", bound=Callable)
NAMESPACE = "hetero_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

# torch.compile keeps compiled graphs on disk and knows operators by their names and arguments, not by the Python
# formulas that it took their gradients from. So each operator's last argument says whose formulas those were.
SOURCES = "str sources"
_traced_by = ""  # of eager calls until something is compiled: nobody keeps those


definitions: dict[str, tuple[str, Callable, Callable, Callable]] = {}
"""Schema, fake, ``setup_context`` and ``backward`` of :func:`define` by operator."""


def constant_when_traced(function: Marked) -> Marked:
    """``torch.compiler.assume_constant_result``, which imports all of the compiler for this one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def digest() -> str:
    """Of this package's version and Python sources."""
    try:
        version = metadata.version("hetero-kernels")
    except metadata.PackageNotFoundError:
        version = ""
    found = hashlib.sha256(version.encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


@constant_when_traced
def _traced_now() -> str:
    global _traced_by
    _traced_by = digest()
    return _traced_by


def define(
    name: str, schema: str, fake: Callable, setup_context: Callable, backward: Callable
) -> tuple[Callable, Callable]:
    """Defines ``hetero_kernels::name`` with its fake and its autograd formula.

    ``schema`` and the callables know nothing of the last argument, ``SOURCES``, which is added here.

    Returns the operator, and a function of the schema's arguments for those who want its gradient: in eager mode it has
    the same formula without the registered one's bookkeeping, and passes the registered one by. Whoever calls it keeps
    none of the outputs that ``setup_context`` saves: the backward may overwrite them (:func:`scale_saved`). Both
    ``setup_context`` and ``backward`` find the operator itself in ``ctx.op``, and that function in ``ctx.again``: a
    backward that runs the pass again may be under a transform of torch.func.
    """

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op, ctx.again = op, differentiable
        setup_context(ctx, inputs[:-1], output)

    def formula(ctx: Any, *grads: Any) -> tuple:
        return (*backward(ctx, *grads), None)

    definitions[name] = (schema, fake, setup_context, backward)
    tags = [torch.Tag.pt2_compliant_tag]
    if "Tensor scalars" in schema:
        # The host reads weights and temperatures to choose launches: a replayed CUDA graph would keep the first ones.
        tags.append(torch.Tag.cudagraph_unsafe)
    _library.define(name + schema.replace(") -> ", f", {SOURCES}) -> ", 1), tags=tags)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]), lib=_library)
    torch.library.register_autograd(qualified, formula, setup_context=setup, lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, torch.library.fallthrough_kernel, f"Autocast{device}")
    op = getattr(torch.ops.hetero_kernels, name).default

    class Transformable(torch.autograd.Function):
        """As torch.func wants it; apply() then inspects forward's signature at every call."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

    Transformable.setup_context = staticmethod(setup)  # type: ignore[method-assign]
    Transformable.backward = staticmethod(formula)  # type: ignore[method-assign]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup(ctx, args, output)
            # Hooks may keep what they are given, and hand out again what they keep.
            ctx.owns_outputs = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            return output

    Function.backward = staticmethod(formula)  # type: ignore[method-assign]

    def differentiable(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args, _traced_now())
        args = (*args, _traced_by)
        grad = torch.is_grad_enabled()
        if forward_ad._current_level >= 0:
            _no_tangents(name, args)
        if torch._C._are_functorch_transforms_active():
            return Transformable.apply(*args) if grad else op(*args)
        if grad:
            return Function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return op, differentiable


def _no_tangents(name: str, args: tuple) -> None:
    """Without a derivative of their own in forward mode, operators would return silent zeros."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            f"hetero_kernels: {name} has no forward-mode derivative; backend='reference' has every kind of derivative"
        )


TRITON_SUFFIX = "_triton"  # of operators that the Triton kernels implement


def define_both(
    name: str, schema: str, fake: Callable, setup_context: Callable, backward: Callable, triton: Callable
) -> tuple[Callable, dict[str, Callable]]:
    """:func:`define` twice: ``name``, which the compiled libraries implement, and its twin of the Triton kernels.

    ``triton`` returns the twin's implementation; it is asked at the first call, which is when Triton is imported.
    Returns the first operator, and the differentiable functions by backend.
    """
    op, compiled = define(name, schema, fake, setup_context, backward)
    _, twin = define(name + TRITON_SUFFIX, schema, fake, setup_context, backward)
    _library.impl(name + TRITON_SUFFIX, lambda *args: triton()(*args[:-1]), "CompositeExplicitAutograd")
    return op, {"cpu": compiled, "cuda": compiled, "triton": twin}


def same_backend(table: dict[str, Callable], op: Any, name: str) -> Callable:
    """Of another operator's differentiable functions by backend, the one of the backend that ``op`` is of: an operator
    ``name``, or its twin."""
    suffix = op.name().removeprefix(f"{NAMESPACE}::{name}")
    return table[suffix.removeprefix("_") or "cpu"]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input has it, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def pack_scalars(*values: float) -> Tensor:
    """Weights and temperatures as one float64 CPU tensor: operators that took them as numbers would be
    recompiled for every new value."""
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * value for value in values])
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return _packed(values, torch.is_inference_mode_enabled())


@functools.lru_cache(maxsize=64)
def _packed(values: tuple[float, ...], inference: bool) -> Tensor:
    """Nobody writes into it: a step may have the tensor of the step before. One of an inference mode stays there."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


# A saved gradient times the incoming one. An operator of its own because its autograd formula is where a second
# derivative is noticed: the saved gradient is a constant to autograd, which would otherwise return silent zeros.


def _scale(gradient: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    # The product is formed in float32 (float64): 1/N alone may underflow in float16.
    scaled = gradient if factor is None else gradient * factor.to(gradient.dtype)
    return scaled.to(like.dtype, copy=scaled is gradient)


def no_second_derivative(ctx: object, *grads: Tensor) -> None:
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
_library.impl("scale_gradient", lambda *args: _scale(*args[:-1]), "CompositeExplicitAutograd")


def _last_to_look(ctx: Any, factor: Tensor | None) -> bool:
    """Whether nothing but the running backward will read what ``ctx`` saved: no caller or hook holds the operator's
    outputs, the graph is freed afterwards, and no transform, batch or derivative of the backward stands in between."""
    return (
        getattr(ctx, "owns_outputs", False)
        and not torch.is_grad_enabled()
        and not (factor is not None and torch._C._functorch.is_legacy_batchedtensor(factor))  # is_grads_batched=True
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def save_pass(ctx: Any, inputs: tuple, output: tuple, tensors: int, options: int) -> None:
    """``setup_context`` of a loss whose forward also returns gradients: ``inputs`` are ``tensors`` tensors, upstream
    factors, ``options`` options of which the last is the reduction, and whether to compute each gradient; ``output`` is
    the loss, both terms, the gradients."""
    end = tensors + 1 + options
    ctx.options, ctx.computed = inputs[tensors + 1 : end], inputs[end:]
    ctx.saved_inputs = tensors
    ctx.save_for_backward(*inputs[:tensors], *output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def saved_pass(
    ctx: Any, grad_loss: Tensor, wanted: Sequence[bool]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """The inputs and gradients of :func:`save_pass`, and the factor that the gradients lack.

    The pass runs again where the forward left a ``wanted`` gradient out, and for reduction="none", whose upstream
    gradient differs from pixel to pixel.
    """
    everything = ctx.saved_tensors  # once: hooks may unpack each tensor only once
    tensors, gradients = everything[: ctx.saved_inputs], everything[ctx.saved_inputs :]
    per_pixel = ctx.options[-1] == "none"
    if not per_pixel and all(c or not w for c, w in zip(ctx.computed, wanted, strict=True)):
        return tensors, gradients, grad_loss
    gradients = ctx.again(*tensors, grad_loss if per_pixel else None, *ctx.options, *wanted)[3:]
    return tensors, gradients, None if per_pixel else grad_loss


def scale_saved(ctx: Any, gradient: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """:func:`scale_gradient` within a backward, in the memory of ``gradient`` where nobody else looks at that again."""
    if not _last_to_look(ctx, factor):
        return scale_gradient(gradient, factor, like)
    # A loss that is differentiated itself comes with a factor of one; on a GPU, asking would wait for it.
    if factor is not None and not (type(factor) is Tensor and factor.is_cpu and factor.item() == 1.0):
        gradient = gradient.mul_(factor)
    return gradient.to(like.dtype)
