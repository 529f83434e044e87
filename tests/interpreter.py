"""Triton's interpreter, without what it does again at every call of a device function."""

import functools
from collections.abc import Callable
from typing import Any


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
