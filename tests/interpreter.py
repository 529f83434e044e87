"""Triton's interpreter, without what it does again for every call of a device function and for every value.

Kernels on small grids are tens of thousands of operations on small arrays, of which numpy's part is a tenth: the rest
is types and shapes. What is remembered here depends on nothing but what it is remembered by.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """All of it, for the process."""
    patch_once_a_launch()
    remember_dtypes()
    remember_shapes()
    check_overflow_by_numpy()
    pass_equal_operands()


def remember_dtypes() -> None:
    """For every value it makes the interpreter writes down numpy's dtypes of all of Triton's, and looks one up."""
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = of


def remember_shapes() -> None:
    """Every value has its shape checked, written out and wrapped again, number by number."""
    from triton.language import core

    check, wrap = core.block_type.__init__, core.tensor.__init__
    checked: dict[tuple, Any] = {}
    wrapped: dict[tuple, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (s.value if isinstance(s, core.constexpr) else s for s in shape)
        key = tuple((type(size), size) for size in sizes)
        if known := checked.get((key, element_ty.name)):
            self.element_ty, self.shape, self.numel, self.name = element_ty, *known
        else:
            check(self, element_ty, shape)
            checked[key, element_ty.name] = self.shape, self.numel, self.name

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if known := wrapped.get(key):
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
        else:
            wrap(self, handle, type)
            wrapped[key] = self.shape, self.numel

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def check_overflow_by_numpy() -> None:
    """Whether integers leave their type the interpreter computes in a dozen operations for each of the kernel's, and
    says only where kernels are debugged. Here they are three, and it is an error."""
    from triton.language import semantic

    operations = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Callable) -> None:
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        assert dtype == rhs.type.scalar and dtype.is_int(), (dtype, rhs.type.scalar)
        exact = operations[binary_op.__name__](lhs.handle.data.astype("int64"), rhs.handle.data.astype("int64"))
        fits = exact.min() >= dtype.get_int_min_value() and exact.max() <= dtype.get_int_max_value()
        assert fits, f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check


def pass_equal_operands() -> None:
    """Two blocks of one type and shape need neither a common type nor a common shape."""
    from triton.language import core, semantic

    find_type, find_shape = (
        semantic.TritonSemantic.binary_op_type_checking_impl, semantic.TritonSemantic.broadcast_impl_value
    )  # fmt: skip
    plain = ("int32", "int64", "fp32", "fp64", "int1")

    def types(self: Any, lhs: Any, rhs: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor):
            name = lhs.dtype.name
            if name == rhs.dtype.name and name in plain:
                return shapes(self, lhs, rhs)
        return find_type(self, lhs, rhs, *arguments, **options)

    def shapes(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # as they are where both have been remembered
            return lhs, rhs
        return find_shape(self, lhs, rhs)

    semantic.TritonSemantic.binary_op_type_checking_impl = types
    semantic.TritonSemantic.broadcast_impl_value = shapes


def patch_once_a_launch() -> None:
    """The interpreter puts numpy into ``triton.language`` at every launch, and again at every call of a device
    function, of which each row of pixels makes hundreds. What it puts there depends on nothing but the modules that the
    function sees: once a launch is enough."""
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[bool] = set()

    @functools.cache
    def sees_core(function: Callable) -> bool:
        """Triton's own functions see ``triton.language.core``, ours ``triton.language``."""
        return any(value is language.core for value in function.__globals__.values())

    def patch_lang(function: Callable) -> Any:
        seen = sees_core(function)
        if seen in patched:
            return None  # of a device function's call, which ignores it
        patched.add(seen)
        return patch(function)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
