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
    if not found and (_FOLDER.parent / "setup.py").exists():
        cure = 'start Python elsewhere, or install with `pip install -e ".[train]"`'
        place = f"imported from the sources in {_FOLDER.parent}"
        return Library(None, f"{place}, where no {name} library was built; {cure}")
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


@functools.cache
def library(name: str) -> Library:
    """The compiled library of a backend, "cpu" or "cuda", loaded when it is first asked for: whoever asks for the CPU's
    has nothing to do with CUDA."""
    if name == "cuda":
        host = host_module()
        info = {"cuda": "", "no_cuda": "no compiled part is installed"} if host is None else host.build_info()
        if not info["cuda"]:
            return Library(None, f"the CUDA library was not built: {info['no_cuda']}")
        if not torch.cuda.is_available():
            return Library(None, "torch sees no CUDA device")
    return _load(name)


@functools.cache
def _no_code_for(device: int) -> str | None:
    """Why the CUDA library has no code for a GPU; None where it has."""
    host = host_module()
    architectures = host.build_info()["cuda_architectures"] if host else ""
    try:
        capability = torch.cuda.get_device_capability(device)
    except RuntimeError as error:  # in a forked process, for one
        return f"torch cannot use CUDA here: {_first_line(error)}"
    if serves(architectures, capability):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
        f"the CUDA library was built for {architectures}; HETERO_KERNELS_CUDA_ARCHS adds others"
    )


def problem(name: str, device: str | None = None) -> str | None:
    """Why the compiled library "cpu" or "cuda" does not run for tensors on ``device`` ("cuda:1"; "cuda" is torch's
    current one), or, without a device, on none at all; None where it runs."""
    found = library(name).problem
    if found is not None or name != "cuda":
        return found
    if device is not None:
        index = torch.device(device).index
        return _no_code_for(torch.cuda.current_device() if index is None else index)
    problems = [_no_code_for(i) for i in range(torch.cuda.device_count())]
    return None if None in problems else problems[0]


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
