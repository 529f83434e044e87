"""What the machine is and what it can do: versions, clocks (read, never set), copy bandwidth, matrix products."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from statistics import median

import torch

from . import tools
from .case import Case, Data, DidNotRun
from .device import MIB, Device

CLOCKS = ("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.draw", "power.limit", "temperature.gpu")  # fmt: skip
SIZE = 8192  # of the matrices
COPIED = 4096 * MIB


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions(device: Device) -> Data:
    nvcc = tools.find("nvcc")
    said = tools.run([nvcc, "--version"], 20).output if nvcc else "not found"
    packages = {p: _version(p) for p in ("torch", "triton", "numpy", "pybind11", "cmake", "ninja", "setuptools")}
    found = {"device": device.name, "python": platform.python_version(), "system": platform.platform(), **packages,
             "torch's CUDA": torch.version.cuda, "nvcc": said.strip().splitlines()[-1], **device.facts()}  # fmt: skip
    return {"detail": f"{device.name}; torch {found['torch']}, triton {found['triton']}", **found}


def clocks(device: Device) -> Data:
    tool = tools.find("nvidia-smi")
    if tool is None:
        raise DidNotRun("nvidia-smi is not there")
    found = {}
    for field in CLOCKS:  # one by one: a name that a driver does not know spoils a query
        done = tools.run([tool, "-i", "0", f"--query-gpu={field}", "--format=csv,noheader"], 10)
        found[field] = done.output.strip() if done.status == 0 else "not known"
    return {"detail": ", ".join(f"{k} {v}" for k, v in found.items()), **found}


def copy_bandwidth(device: Device) -> Data:
    """Of a copy within the device, read and written bytes together."""
    size = COPIED if device.kind == "cuda" else MIB
    source = torch.empty(size, dtype=torch.uint8, device=device.device).fill_(3)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = median(device.times([lambda: target.copy_(source)], device.repeats[0] * 4)[0])
    rate = 2 * size / milliseconds / 1e6
    return {"detail": f"{rate:.0f} GB/s", "GB/s": rate}


def matrix_products(device: Device) -> Data:
    size = SIZE if device.kind == "cuda" else 64
    rates = {}
    for kind, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
        multiply = functools.partial(torch.mm, a, b, out=a @ b)
        milliseconds = median(device.times([multiply], device.repeats[0] * 2)[0])
        rates[kind] = 2 * size**3 / milliseconds / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return {"detail": ", ".join(f"{k} {v:.0f} TFLOP/s" for k, v in rates.items()), "TFLOP/s": rates}


def cases() -> list[Case]:
    return [
        Case("machine/versions", versions, rehearse=True),
        Case("machine/clocks", clocks),
        Case("machine/copy bandwidth", copy_bandwidth, rehearse=True),
        Case("machine/matrix products", matrix_products, rehearse=True),
        Case("machine/clocks after work", clocks),
    ]
