"""The one place where a backend is chosen: by device and by what is built, or by the user.

A user's choice (``backend=`` or the variable ``HETERO_KERNELS_BACKEND``) runs or raises saying why. The automatic
choice takes the first backend of the device's list that is available and warns once where that is not the first.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from .. import native
from ..options import check_backend
from .library import constant_when_traced

_BY_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def triton_is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, step by step: for tests, and for anyone without a GPU to try a case."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it comes with torch's GPU builds)"
    if triton_is_interpreted() or torch.cuda.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to try them)"


def unavailable(backend: str, device: str | None = None) -> str | None:
    """Why ``backend`` cannot run for tensors on ``device`` (without one: on any that is here); None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_problem()
    return native.problem(backend, device)


def available(device: str | torch.device) -> tuple[str, ...]:
    """Names of the backends that can run for tensors on ``device`` ("cpu", "cuda", "cuda:1", ...), the one that an
    automatic choice prefers first; the reference, which runs everywhere, last. "cuda" is torch's current GPU."""
    device = str(device)
    return tuple(b for b in _candidates(device) if unavailable(b, device) is None)


def _candidates(device: str) -> tuple[str, ...]:
    return _BY_DEVICE.get(device.partition(":")[0], ("reference",))


def _with_index(device: str) -> str:
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and torch.cuda.is_available() else device


@functools.cache
def warn_once(message: str, stacklevel: int) -> None:
    """A RuntimeWarning, once in a process; ``stacklevel`` counts from here."""
    warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


@functools.cache
def _automatic(device: str) -> str:
    candidates = _candidates(device)
    backend = available(device)[0]
    if backend != candidates[0]:
        reasons = "; ".join(f"{b}: {unavailable(b, device)}" for b in candidates[: candidates.index(backend)])
        warn_once(  # for a kind of devices, however many there are
            f"hetero_kernels runs its {backend!r} backend for {device.partition(':')[0]} tensors ({reasons}). "
            f"Pass backend={backend!r} to choose it without this warning.",
            stacklevel=6,
        )
    return backend


@constant_when_traced
def select(backend: str | None, device: str | torch.device) -> str:
    """Name of the backend that runs for tensors on ``device`` ("cpu", "cuda:1", ...; "cuda" is torch's current GPU).

    Raises ValueError for a name that does not exist or does not serve the device, RuntimeError for a backend
    that is not available, with the reason.
    """
    device, source = str(device), "backend"
    if backend is None and os.environ.get("HETERO_KERNELS_BACKEND"):
        backend, source = os.environ["HETERO_KERNELS_BACKEND"], "HETERO_KERNELS_BACKEND"
    if backend is None:
        return _automatic(_with_index(device))
    check_backend(backend, source)
    interpreted = backend == "triton" and triton_is_interpreted()
    if backend != "reference" and not interpreted and backend not in _candidates(device):
        raise ValueError(f"{source}={backend!r} does not serve tensors on {device!r}")
    problem = unavailable(backend, device)
    if problem is not None:
        raise RuntimeError(f"{source}={backend!r} was asked for but is not available: {problem}")
    return backend


@constant_when_traced
def select_among(able: tuple[str, ...], backend: str | None, device: str) -> str:
    """As :func:`select`, for operators that only some backends have: an automatic choice prefers the ``able``,
    a user's stands, able or not."""
    chosen = select(backend, device)
    if chosen in able or backend is not None or os.environ.get("HETERO_KERNELS_BACKEND"):
        return chosen
    return next((b for b in _candidates(device) if b in able and unavailable(b, device) is None), chosen)
