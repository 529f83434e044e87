"""What `make wheels` leaves in dist/: what is in the wheels, and that each does its work in a fresh environment, where
no compiler is, under every torch it is for. CPU_TORCH_INDEX: where pip finds the builds of torch without CUDA, if not
where it looks anyway."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
NEWEST = re.search(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
TORCHES = [("cpu", "2.10.0"), ("cpu", "2.13.0+cpu"), ("cuda", "2.10.0"), ("cuda", "2.11.0"), ("cuda", NEWEST)]
LARGEST = 100e6  # bytes that PyPI takes in one file

pytestmark = pytest.mark.skipif("MAKE_WHEELS" not in os.environ, reason="make wheels builds and tries them")


def wheel(kind: str) -> Path:
    name = f"hetero_kernels-{VERSION}{'+cpu' if kind == 'cpu' else ''}-{PYTHON}-{PYTHON}-*.whl"
    found = list((ROOT / "dist").glob(name))
    assert len(found) == 1, f"make wheels leaves one {name} in dist/, found {found}"
    return found[0]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_contents(kind):
    path = wheel(kind)
    assert "manylinux" in path.name and path.stat().st_size < LARGEST
    names = zipfile.ZipFile(path).namelist()
    libraries = {Path(name).name.partition(".")[0] for name in names if ".so" in name}
    expected = {"_host", "libhetero_kernels_cpu"} | ({"libhetero_kernels_cuda"} if kind == "cuda" else set())
    assert libraries == expected  # none of torch's, CUDA's or the compiler's
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)


SMOKE = """
import shutil, sys
import torch
import hetero_kernels
from hetero_kernels import HeteroAKDLoss, native

wanted, kind = sys.argv[1:]
assert torch.__version__.startswith(wanted), torch.__version__
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "nvcc", "cmake", "ninja")))
hetero_kernels.show_config()
generator = torch.Generator().manual_seed(0)
student, teacher, logits = (torch.randn(2, n, 8, 8, generator=generator) for n in (8, 12, 5))
labels = torch.randint(0, 5, (2, 32, 32), generator=generator)
for options in ({}, {"resolution": "feature"}, {"projector": "conv", "resolution": "feature"}, {"kem": "spatial"}):
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        criterion = HeteroAKDLoss(8, 12, 5, backend=backend, **options)
        features, own = student.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = criterion(features, teacher, labels, own, logits.flip(0)).loss
        loss.backward()
        results.append([loss.detach(), features.grad, own.grad, *(p.grad for p in criterion.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6, (options, ours, expected)
info = native.host_module().build_info()
assert bool(info["cuda_architectures"]) == (kind == "cuda"), info
if kind == "cuda":
    assert native._load("cuda").problem is None, native._load("cuda")
print("smoke: all is well")
"""


@pytest.fixture
def environment(tmp_path):
    """The folder of a fresh virtual environment, which does not stay: a torch is gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    yield tmp_path / "env"
    shutil.rmtree(tmp_path / "env")


@pytest.mark.parametrize(("kind", "torch"), TORCHES, ids=str)
def test_it_works_without_a_compiler(kind, torch, environment, tmp_path):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HETERO_KERNELS", "PYTHONPATH"))}
    variables["PATH"] = str(environment / "bin")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in (environment / "bin" / "python", *arguments)]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)

    install = ["-m", "pip", "install", "-q", "--no-compile", "--no-cache-dir", "--only-binary", ":all:"]
    if "+" in torch and (index := os.environ.get("CPU_TORCH_INDEX")):
        install += ["--extra-index-url", index]
    done = run(*install, f"torch=={torch}", wheel(kind))
    if "+" in torch and "No matching distribution found for torch" in done.stderr:
        pytest.skip(f"no index here has torch {torch}: not tried")
    assert done.returncode == 0, done.stderr
    done = run("-c", SMOKE, torch, kind)
    assert "smoke: all is well" in done.stdout, done.stdout + done.stderr
