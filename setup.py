"""Builds the native libraries with CMake, against the torch that is installed where this package will be.

Environment:
    HETERO_KERNELS_TORCH_DIR  folder of the torch package to build against (default: the environment's)
    HETERO_KERNELS_CUDA       0 leaves the CUDA library out, 1 insists on it (default: where torch and nvcc fit and it
                              compiles)
    HETERO_KERNELS_CUDA_ARCHS CUDA architectures in CMake's notation, e.g. "90;120"
    HETERO_KERNELS_BUILD_DIR  folder to build in that stays: the next build compiles what has changed, and goes on where
                              one was interrupted (default: a temporary one)
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
LIBRARIES = "libhetero_kernels_*"
CUDA_CHOSEN = "hetero-kernels: CUDA library for"  # what CMakeLists.txt says before it builds one


def torch_folder() -> Path:
    """torch's folder, found as files and never imported: pip's isolated builds hide the environment's packages from
    import but still name where they are."""
    candidates = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.append(str(Path(spec.origin).parent.parent))
    folders = [Path(c) / "torch" for c in candidates]
    if override := os.environ.get("HETERO_KERNELS_TORCH_DIR"):
        folders = [Path(override)]
    for folder in folders:
        if (folder / "version.py").exists():
            return folder
    sys.exit(
        f"hetero-kernels builds against the torch it will run with, and none is installed in "
        f"{', '.join(sorted({str(f.parent) for f in folders}))}. Install torch >= 2.10 first (pip install torch), or "
        f"set HETERO_KERNELS_TORCH_DIR to its folder."
    )


def torch_facts(folder: Path) -> tuple[str, str]:
    """Version and CUDA version ("" for a CPU-only torch)."""
    text = (folder / "version.py").read_text()
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.M)
    cuda = re.search(r"^cuda[^=]*=\s*'([^']+)'", text, re.M)
    if version is None:
        sys.exit(f"hetero-kernels cannot read torch's version from {folder / 'version.py'}")
    if tuple(int(n) for n in version[1].split("+")[0].split(".")[:2] if n.isdigit()) < MINIMUM_TORCH:
        sys.exit(f"hetero-kernels needs torch >= 2.10, found {version[1]} in {folder}")
    return version[1], cuda[1] if cuda else ""


class StepFailed(Exception):
    """A step of the build; its argument is what it printed, line by line."""


def run(command: list[str]) -> list[str]:
    """Runs a step of the build, showing what it prints, and returns that. Raises StepFailed."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )  # fmt: skip
    except FileNotFoundError:
        sys.exit(f"hetero-kernels: {command[0]} is needed to build and was not found (pip install {command[0]})")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait():
        raise StepFailed(lines)
    return lines


def first_error(lines: list[str]) -> str:
    """What went wrong first, in one line: what a compiler says, else what CMake does, else the last line."""
    # The word stands in options of compilers, too (-diag-error).
    said = [line for line in lines if re.search(r"(?<![\w-])(error|fatal)\b", line, re.I)]
    wrong = next((line for line in said if not line.startswith(("CMake Error", "-- "))), "")
    message = re.search(r"^CMake Error.*\n((?:(?!Call Stack|--).*\n){1,6})", "\n".join(lines), re.M)
    if not wrong and message:
        wrong = " ".join(message[1].split())
    return (wrong or (lines or ["no output"])[-1]).replace(f"{ROOT}{os.sep}", "")


def explain(lines: list[str]) -> str:
    """One message for a build that failed with this output."""
    text = "\n".join(lines)
    reason = re.search(r"hetero-kernels: no CUDA library \((.*)\)", text)
    if reason and "HETERO_KERNELS_CUDA=1 insists" in text:
        return f"hetero-kernels: HETERO_KERNELS_CUDA=1 insists on the CUDA library: {reason[1]}"
    if "CMAKE_CXX_COMPILER" in text:
        return "hetero-kernels: no C++ compiler was found; install one for C++20 (GCC >= 11, Clang >= 14) or set CXX"
    wrong = first_error(lines)
    cuda = any(".cu" in line and "FAILED" in line for line in lines) or "nvcc" in wrong or "CUDA" in wrong
    advice = "HETERO_KERNELS_CUDA=0 builds without CUDA" if cuda else "C++20 is needed: GCC >= 11 or Clang >= 14"
    return f"hetero-kernels: the build failed: {wrong} ({advice}; the full log is above, with pip install -v)"


def forget_tools(build: Path) -> None:
    """Lets a folder that stays be configured anew: CMake would go on with the source, the compilers and the ninja of
    the build before, and an isolated build's is gone. Objects stay, and are kept where their commands do."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for found in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found)


class CMakeBuild(build_ext):
    """Runs CMake once; its install step puts all libraries into the package."""

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: setuptools brings the extension, the libraries beside it come along."""
        super().copy_extensions_to_source()
        for stale in (ROOT / "hetero_kernels").glob(LIBRARIES):
            stale.unlink()
        for library in Path(self.build_lib, "hetero_kernels").glob(LIBRARIES):
            self.copy_file(str(library), str(ROOT / "hetero_kernels" / library.name))

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder = torch_folder()
        version, cuda = torch_facts(folder)
        print(f"hetero-kernels: building against torch {version} (CUDA: {cuda or 'none'}) in {folder}", flush=True)
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(os.environ.get("HETERO_KERNELS_BUILD_DIR") or Path(self.build_temp, "cmake")).resolve()
        forget_tools(build)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHK_TORCH_DIR={folder}", f"-DHK_TORCH_VERSION={version}", f"-DHK_TORCH_CUDA={cuda}",
        ]  # fmt: skip
        if architectures := os.environ.get("HETERO_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")

        def steps(cuda: str, failed: str = "") -> None:
            configured = run([*configure, f"-DHK_CUDA={cuda}", f"-DHK_CUDA_FAILED={failed}"])
            try:
                run(["cmake", "--build", str(build)])
            except StepFailed as failure:
                raise StepFailed(configured + failure.args[0]) from None

        wanted = {"0": "OFF", "1": "ON"}.get(os.environ.get("HETERO_KERNELS_CUDA", ""), "AUTO")
        try:
            try:
                steps(wanted)
            except StepFailed as failure:
                if wanted != "AUTO" or not any(CUDA_CHOSEN in line for line in failure.args[0]):
                    raise
                # Whoever did not ask for CUDA gets the rest; if that is at fault it fails again and says so.
                steps("OFF", f"it does not compile here: {first_error(failure.args[0])}")
            for stale in target.glob(LIBRARIES):  # of a build before, which may have had more
                stale.unlink()
            run(["cmake", "--install", str(build)])
        except StepFailed as failure:
            sys.exit(explain(failure.args[0]))


setup(ext_modules=[Extension("hetero_kernels._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
