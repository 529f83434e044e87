"""Compiles the kernels with g++ for the host, once for each state of the sources.

The result goes to ``HETERO_KERNELS_EMULATION_DIR`` or the user's cache folder, never into the source tree.
``HETERO_KERNELS_EMULATION_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers; Python must then
have been started with their runtime (:func:`sanitizer_environment`). ``HETERO_KERNELS_EMULATION_OPTIMIZE=1`` takes less
time to compile than the 2 that is the default, and more to run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SOURCES = ("bridge.cpp", "emulation.cpp", "fiber.cpp")
PLANS = ("pixel_losses/plan.cpp", "projected_losses/projected_plan.cpp", "projection/projection_plan.cpp")


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sanitized() -> bool:
    return os.environ.get("HETERO_KERNELS_EMULATION_SANITIZE") == "1"


def sanitizer_environment() -> dict[str, str]:
    """What a Python process that loads the sanitized build must be started with."""
    found = [
        subprocess.run([compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
        for name in ("asan", "ubsan")
    ]
    return {
        "HETERO_KERNELS_EMULATION_SANITIZE": "1",
        "LD_PRELOAD": ":".join(str(Path(f.stdout.strip()).resolve()) for f in found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def flags() -> list[str]:
    common = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi",
              "-march=native", "-ffp-contract=fast", "-fno-math-errno"]  # fmt: skip
    if sanitized():
        return [*common, "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return [*common, f"-O{os.environ.get('HETERO_KERNELS_EMULATION_OPTIMIZE', '2')}"]


def compiled() -> Path:
    """The library's path, after building it where it is not there yet."""
    digest = hashlib.sha256()
    files = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *(ROOT / "csrc").rglob("*.*")])
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update(repr((flags(), compiler(), sys.version)).encode())
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hetero-kernels"
    folder = Path(os.environ.get("HETERO_KERNELS_EMULATION_DIR", default))
    name = f"emulation_{digest.hexdigest()[:16]}"
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:  # processes that run tests side by side compile it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(name, target)
    return target


def _compile(name: str, target: Path) -> None:
    import pybind11

    part = target.with_suffix(f".{os.getpid()}.part")
    command = [
        compiler(), *flags(), f"-DHK_MODULE={name}", f'-DHK_EMULATION="{FOLDER / "cuda.h"}"',
        f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}",
        *(str(FOLDER / s) for s in SOURCES), *(str(ROOT / "csrc/cuda" / p) for p in PLANS), "-o", str(part),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulation does not compile:\n{done.stderr[-4000:]}")
    part.rename(target)


def load() -> types.ModuleType:
    path = compiled()
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
