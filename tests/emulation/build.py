"""Compiles the kernels with g++ for the host, once for each state of the sources.

Each of csrc/cuda's files is compiled by itself, as nvcc does it, into an object that is kept by what the compiler
reads: after a change, planted or not, only what includes it is compiled again. Libraries and objects go to
``HETERO_KERNELS_EMULATION_DIR`` or the user's cache folder, never into the source tree; objects that are in
``HETERO_KERNELS_EMULATION_OBJECTS`` are taken from there. ``HETERO_KERNELS_EMULATION_SANITIZE=1`` builds with the
address and undefined-behaviour sanitizers, all but the bridge to Python; Python must then have been started with their
runtime (:func:`sanitizer_environment`).
"""

from __future__ import annotations

import concurrent.futures
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
CUDA = ROOT / "csrc" / "cuda"
MODULE = "emulated"  # bridge.cpp's


def sources() -> list[Path]:
    """Kernels and launchers first, which take longest; the emulation; plans. core/card.cu, which asks a GPU, is not."""
    kernels = (path for path in CUDA.glob("*/*.cu") if path.parent.name != "core")
    return [*sorted(kernels), *sorted(FOLDER.glob("*.cpp")), *sorted(CUDA.glob("*/*plan.cpp"))]


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


def flags(source: Path | None = None) -> list[str]:
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi",
              "-march=native", "-ffp-contract=fast", "-fno-math-errno"]  # fmt: skip
    if sanitized() and (source is None or source.stem != "bridge"):  # pybind11's templates, and nothing of the kernels
        level = 2 if source is not None and source.stem == "emulation" else 0  # what every access goes through
        return [*common, f"-O{level}", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    # Most kernels run on little, so that optimizing them would take longer than it saves; pybind11's templates, too.
    level = {"bridge": 0, "emulation": 2}.get(source.stem if source else "", 1)
    return [*common, f"-O{level}"]


def folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hetero-kernels"
    return Path(os.environ.get("HETERO_KERNELS_EMULATION_DIR", default))


def compiled() -> Path:
    """The library's path, after building it where it is not there yet."""
    digest = hashlib.sha256(repr((flags(), compiler(), sys.version)).encode())
    files = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *(ROOT / "csrc").rglob("*.*")])
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    name = f"emulation_{digest.hexdigest()[:16]}"
    target = folder() / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{name}.lock").open("w") as lock:  # processes that run tests side by side compile it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled_object, sources()))
            # Of functions that are in several objects the first is taken: not the bridge's, which may be unsanitized.
            objects.sort(key=lambda path: path.name.startswith("bridge"))
            _make(target, "-shared", *flags(), *map(str, objects))
    return target


def preprocessed(source: Path) -> str:
    """What the compiler reads of a source, without the names of files."""
    return _run(*_command(source), "-E", "-P")


def compiled_object(source: Path) -> Path:
    read = repr((flags(source), compiler(), sys.version)) + preprocessed(source)
    name = f"{source.stem}_{hashlib.sha256(read.encode()).hexdigest()[:16]}.o"
    for place in filter(None, (os.environ.get("HETERO_KERNELS_EMULATION_OBJECTS"), folder())):
        if (found := Path(place) / name).exists():
            return found
    return _make(folder() / name, *_command(source)[1:], "-c")


def _command(source: Path) -> list[str]:
    import pybind11

    return [
        compiler(), *flags(source), f'-DHK_EMULATION="{FOLDER / "cuda.h"}"',
        f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}", "-x", "c++", str(source),
    ]  # fmt: skip


def _make(target: Path, *arguments: str) -> Path:
    """A file that is there whole or not at all."""
    part = target.with_suffix(f".{os.getpid()}.part")
    _run(compiler(), *arguments, "-o", str(part))
    return part.rename(target)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulation does not compile:\n{done.stderr[-4000:]}")
    return done.stdout


def load() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, compiled())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
