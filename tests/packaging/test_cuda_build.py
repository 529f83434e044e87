"""What a build needs of torch's headers, and what becomes of it where the CUDA library does not compile."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from installing import OLDEST_TORCH, ROOT, run

import hetero_kernels

CSRC = ROOT / "csrc"


def includes(path: Path) -> tuple[set[Path], bool]:
    """Our files that a file includes, directly or by way of others, and whether any of them includes torch's."""
    ours, with_torch, left = {path}, False, [path]
    while left:
        one = left.pop()
        for quote, name in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', one.read_text(), re.M):
            with_torch = with_torch or name.startswith(("torch/", "ATen/", "c10/"))
            found = (one.parent / name).resolve()
            if quote == '"' and found.exists() and found not in ours:
                ours.add(found)
                left.append(found)
    return ours, with_torch


INCLUDES = {path: includes(path) for path in sorted(CSRC.rglob("*.c*")) if path.suffix in (".cpp", ".cu")}
REGISTRATIONS = [path for path, (_, with_torch) in INCLUDES.items() if with_torch]


def test_the_registrations_of_both_libraries_are_found():
    """And through them every file that includes torch's headers."""
    assert {path.relative_to(CSRC).parts[0] for path in REGISTRATIONS} == {"cpu", "cuda"}
    direct = {p for p in CSRC.rglob("*.[hc]*") if re.search(r"#include <(torch|ATen|c10)/", p.read_text())}
    assert len(direct) >= 2 and direct <= set().union(*(INCLUDES[path][0] for path in REGISTRATIONS))


@pytest.fixture(scope="module")
def oldest_headers(oldest_torch) -> Path:
    packages = run(oldest_torch, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    return Path(packages.strip()) / "torch" / "include"


@pytest.mark.parametrize("path", REGISTRATIONS, ids=lambda p: str(p.relative_to(CSRC)))
def test_the_oldest_torchs_headers_do(path, oldest_headers):
    """What a later torch's headers make runs with the oldest; its own must make it, too."""
    (target,) = re.findall(r"TORCH_TARGET_VERSION=(0x\w+)", (ROOT / "CMakeLists.txt").read_text())
    major, minor = (int(n) for n in OLDEST_TORCH.split(".")[:2])
    assert int(target.rstrip("UL"), 16) == major << 56 | minor << 48
    cuda = ["-DUSE_CUDA"] if path.is_relative_to(CSRC / "cuda") else []
    folders = [f"-isystem{oldest_headers / f}" for f in ("", "torch/csrc/api/include")]
    flags = ("-std=c++20", "-fsyntax-only", "-w", "-x", "c++", f"-DTORCH_TARGET_VERSION={target}")
    run(os.environ.get("CXX", "g++"), *flags, *cuda, *folders, path)


NVCC = shutil.which("nvcc")
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *) echo "nvcc fatal   : planted"; exit 1 ;;
esac
"""


@pytest.fixture(params=[pytest.param("source", marks=pytest.mark.skipif(NVCC is None, reason="no nvcc")), "compiler"])
def broken(request, no_kernels, tmp_path) -> tuple[Path, dict[str, str], str]:
    """A tree whose CUDA library can't be compiled by an nvcc that fits torch, since its source is wrong or the compiler
    does not work; the variables to build it with; and what is to be said."""
    tree, binaries, beside = no_kernels, tmp_path / "bin", tmp_path / "torch"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # pip's cmake and ninja, where the system has none
    binaries.mkdir()
    if request.param == "source":
        version = re.search(r"release (\d+\.\d+)", run(NVCC, "--version"))[1]
        (card,) = (tree / "csrc" / "cuda").rglob("card.cu")
        card.write_text('#error planted, with "quotes", $signs; and \\backslashes\n')
        environment, expected = {}, f'{card.relative_to(tree)}:1:2: error: #error planted, with "quotes", $signs; and'
    else:
        version = "13.0"
        (binaries / "nvcc").write_text(FAKE_NVCC)
        (binaries / "nvcc").chmod(0o755)
        path = f"{binaries}:{path}"
        environment, expected = {"CUDA_HOME": str(tmp_path)}, "CUDA"
    beside.mkdir()  # a torch whose CUDA is nvcc's
    for name in ("include", "lib"):
        (beside / name).symlink_to(Path(torch.__file__).parent / name)
    (beside / "version.py").write_text(f"__version__ = '{torch.__version__}'\ncuda: str = '{version}'\n")
    return tree, {**environment, "PATH": path, "HETERO_KERNELS_TORCH_DIR": str(beside)}, expected


def build(broken, tmp_path, **environment):
    tree, variables, _ = broken
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    command = (sys.executable, "setup.py", "-q", "build_ext", *folders)
    return run(*command, cwd=tree, check=False, HETERO_KERNELS_CUDA_ARCHS="90", **variables, **environment)


def test_without_cuda_that_compiles_the_rest_is_installed_and_says_why(broken, tmp_path):
    (tmp_path / "lib" / "hetero_kernels").mkdir(parents=True)
    (tmp_path / "lib" / "hetero_kernels" / "libhetero_kernels_cuda.so").write_text("of a build before")
    out = build(broken, tmp_path)
    built = {path.name.partition(".")[0]: path for path in (tmp_path / "lib" / "hetero_kernels").iterdir()}
    assert set(built) == {"_host", "libhetero_kernels_cpu"}, out[-4000:]
    # As a package: with its kernels, in place of the empty library.
    ignored = shutil.ignore_patterns("__pycache__", "_host*", "libhetero_kernels_cuda*")
    shutil.copytree(Path(hetero_kernels.__file__).parent, tmp_path / "package" / "hetero_kernels", ignore=ignored)
    shutil.copy(built["_host"], tmp_path / "package" / "hetero_kernels")
    script = "import hetero_kernels; hetero_kernels.show_config()"
    shown = run(sys.executable, "-c", script, cwd=tmp_path / "package", PYTHONPATH=str(tmp_path / "package"))
    assert "cpu        available" in shown
    said = re.search(r"cuda       not available: the CUDA library was not built: it does not compile here: (.*)", shown)
    assert said and broken[2] in said[1] and len(said[1]) < 500, shown


def test_who_insists_on_cuda_gets_its_error(broken, tmp_path):
    last = build(broken, tmp_path, HETERO_KERNELS_CUDA="1").strip().splitlines()[-1]
    assert last.startswith("hetero-kernels: the build failed: ") and broken[2] in last
    assert "HETERO_KERNELS_CUDA=0 builds without CUDA" in last
    assert not list((tmp_path / "lib").rglob("*.so"))
