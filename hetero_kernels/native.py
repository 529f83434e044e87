"""Loads the compiled libraries, says what is in them and, where one is missing, why.

Importing never fails here: a library that is absent or broken leaves a reason that ``show_config`` prints and that a
backend chosen by name raises.
"""

from __future__ import annotations

import functools
import importlib.util
import types
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_SUFFIXES = (".so", ".dylib", ".dll")


@dataclass(frozen=True)
class Library:
    """One compiled library: where it was found, and what keeps it from running (None: nothing)."""

    path: Path | None
    problem: str | None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _load(name: str) -> Library:
    found = [p for p in (_FOLDER / f"libhetero_kernels_{name}{s}" for s in _SUFFIXES) if p.exists()]
    if not found:
        return Library(None, f"the {name} library was not built; reinstall with a C++20 compiler (README, Install)")
    try:
        torch.ops.load_library(str(found[0]))
    except Exception as error:  # whatever the loader says is the reason we keep
        return Library(found[0], f"{found[0].name} cannot be loaded: {_first_line(error)}")
    return Library(found[0], None)


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` (CMake's notation, "80-real 90-real 120") runs on a GPU of this compute
    capability: machine code within its major version, on the same minor one or a later; PTX on everything later."""
    for entry in architectures.split():
        number, _, kind = entry.partition("-")
        specific = number[-1] in "af"  # sm_90a and the like run nowhere else
        major, minor = divmod(int(number.rstrip("af")), 10)
        same_minor = minor == capability[1]
        if kind != "virtual" and major == capability[0] and (same_minor or (minor < capability[1] and not specific)):
            return True
        if kind != "real" and not specific and (major, minor) <= capability:
            return True
    return False


def _load_cuda() -> Library:
    host = host_module()
    info = {"cuda": "", "cuda_architectures": ""} if host is None else host.build_info()
    if not info["cuda"]:
        return Library(
            None,
            "the CUDA library was not built (HETERO_KERNELS_CUDA=0, or no CUDA toolkit that fits torch, at build time)",
        )
    if not torch.cuda.is_available():
        return Library(None, "torch sees no CUDA device")
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not serves(info["cuda_architectures"], capability):
            return Library(
                None,
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
                f"the CUDA library was built for {info['cuda_architectures']}; HETERO_KERNELS_CUDA_ARCHS adds others",
            )
    return _load("cuda")


@functools.cache
def libraries() -> dict[str, Library]:
    """The compiled libraries by backend name."""
    return {"cpu": _load("cpu"), "cuda": _load_cuda()}


@functools.cache
def host_module() -> types.ModuleType | None:
    """The pybind11 module with build facts and the CPU's instruction sets, or None where it is not built."""
    # From this very folder: an editable install of another copy would answer an ordinary import.
    spec = PathFinder.find_spec("hetero_kernels._host", [str(_FOLDER)])
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module
