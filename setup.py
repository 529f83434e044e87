"""Builds the native libraries with CMake, against the torch that is installed where this package will be.

Environment:
    HETERO_KERNELS_TORCH_DIR  folder of the torch package to build against (default: the environment's)
    HETERO_KERNELS_CUDA       0 leaves the CUDA library out
    HETERO_KERNELS_CUDA_ARCHS CUDA architectures in CMake's notation, e.g. "90;120"
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)


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


class CMakeBuild(build_ext):
    """Runs CMake once; its install step puts all libraries into the package."""

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: setuptools brings the extension, the libraries beside it come along."""
        super().copy_extensions_to_source()
        for library in Path(self.build_lib, "hetero_kernels").glob("libhetero_kernels_*"):
            self.copy_file(str(library), str(ROOT / "hetero_kernels" / library.name))

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder = torch_folder()
        version, cuda = torch_facts(folder)
        print(f"hetero-kernels: building against torch {version} (CUDA: {cuda or 'none'}) in {folder}", flush=True)
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHK_TORCH_DIR={folder}", f"-DHK_TORCH_VERSION={version}", f"-DHK_TORCH_CUDA={cuda}",
            f"-DHK_CUDA={'OFF' if os.environ.get('HETERO_KERNELS_CUDA') == '0' else 'ON'}",
        ]  # fmt: skip
        if architectures := os.environ.get("HETERO_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            subprocess.run(command, check=True)


setup(ext_modules=[Extension("hetero_kernels._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
