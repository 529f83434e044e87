"""Libraries that are missing, broken or forced: the reference keeps working and the reason is said."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from cases import make_case

import hetero_kernels
from hetero_kernels import functional, native
from hetero_kernels.ops import projected_losses

PACKAGE = Path(hetero_kernels.__file__).parent
SCRIPT = """
import warnings, torch, hetero_kernels
from hetero_kernels import functional
hetero_kernels.show_config()
logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        print("loss", functional.hakd_loss(logits, logits, labels).item())
print("warnings", len(caught), caught[0].message if caught else "")
try:
    functional.hakd_loss(logits, logits, labels, backend="cpu")
except RuntimeError as error:
    print("refused", error)
"""


def run(folder: Path, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = processes.run("-c", SCRIPT, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hetero_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_this_build_has_its_library():
    """Every other test of the CPU backend would be skipped silently without it."""
    assert native.problem("cpu") is None
    assert native.host_module() is not None


def test_missing_library(copied):
    for library in (copied / "hetero_kernels").glob("libhetero_kernels_cpu*"):
        library.unlink()
    out = run(copied)
    assert "cpu        not available: the cpu library was not built" in out
    assert "reference  available" in out and out.count("loss ") == 3
    assert "warnings 1 hetero_kernels runs its 'reference' backend for cpu tensors" in out
    assert "refused backend='cpu' was asked for but is not available: the cpu library was not built" in out


def test_sources_that_hide_what_is_installed(copied):
    """Python started in a checkout after `pip install .` imports the folder there."""
    for library in (copied / "hetero_kernels").glob("*.so"):
        library.unlink()
    (copied / "setup.py").touch()
    out = run(copied)
    assert f"imported from the sources in {copied}, where no cpu library was built; start Python elsewhere" in out


def test_broken_library(copied):
    (library,) = (copied / "hetero_kernels").glob("libhetero_kernels_cpu*")
    library.write_bytes(b"not a library")
    out = run(copied)
    assert f"cpu        not available: {library.name} cannot be loaded" in out
    assert out.count("loss ") == 3 and "refused" in out


def test_missing_host_module(copied):
    for module in (copied / "hetero_kernels").glob("_host*"):
        module.unlink()
    out = run(copied)
    assert "the compiled parts are not installed" in out and out.count("loss ") == 3


def test_environment_chooses_the_backend(copied):
    assert "refused" not in run(copied, HETERO_KERNELS_BACKEND="cpu")
    out = run(copied, HETERO_KERNELS_BACKEND="reference")
    assert "warnings 0" in out


def test_environment_must_name_a_backend(monkeypatch):
    monkeypatch.setenv("HETERO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="HETERO_KERNELS_BACKEND is 'fast', expected one of"):
        functional.hakd_loss(*make_case("stride 8", "randn"))


def test_forced_instruction_set(monkeypatch):
    case = make_case("stride 8", "randn")
    losses = []
    for isa in native.host_module().instruction_sets():
        monkeypatch.setenv("HETERO_KERNELS_CPU_ISA", isa)
        assert native.host_module().active_instruction_set() == isa
        losses.append(functional.hakd_loss(*case))
    assert "portable" in native.host_module().instruction_sets()
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-5, atol=0)
    monkeypatch.setenv("HETERO_KERNELS_CPU_ISA", "avx10")
    with pytest.raises(
        RuntimeError, match="HETERO_KERNELS_CPU_ISA is 'avx10', this machine and build have: .*portable"
    ):
        functional.hakd_loss(*case)


def test_show_config_names_every_backend(capsys):
    hetero_kernels.show_config()
    out = capsys.readouterr().out
    for word in ("reference", "cpu", "cuda", "triton", "instruction set", torch.__version__):
        assert word in out


def test_show_config_shows_what_the_environment_forces(monkeypatch, capsys):
    monkeypatch.setenv("HETERO_KERNELS_BACKEND", "fast")
    monkeypatch.setenv("HETERO_KERNELS_CPU_ISA", "avx10")
    hetero_kernels.show_config()
    out = capsys.readouterr().out
    assert "HETERO_KERNELS_BACKEND=fast, which is no backend" in out
    assert "cpu instruction set: none: HETERO_KERNELS_CPU_ISA is 'avx10'" in out


def test_cuda_library_is_a_library_of_its_own():
    """Where it was built it loads beside this torch, GPU or not, and the CPU's does not need it."""
    built = native.host_module().build_info()["cuda"]
    found = list(PACKAGE.glob("libhetero_kernels_cuda*"))
    assert bool(found) == bool(built)
    if found and torch.version.cuda:
        torch.ops.load_library(str(found[0]))
    assert native.problem("cpu") is None
    if not torch.cuda.is_available():
        assert native.problem("cuda") is not None


@pytest.mark.parametrize(
    "architectures, capability, served",
    [
        ("80-real 86-real 90-real 120", (8, 0), True),
        ("80-real 86-real 90-real 120", (8, 7), True),  # machine code runs on later minor versions
        ("80-real 86-real 90-real 120", (7, 5), False),
        ("80-real 86-real 90-real 120", (10, 0), False),  # no machine code for it, and PTX for later ones only
        ("80-real 86-real 90-real 120", (12, 1), True),
        ("90", (10, 3), True),
        ("90-virtual", (9, 0), True),
        ("90a-real", (9, 0), True),
        ("100f-real 90a-virtual", (10, 3), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_serves(architectures, capability, served):
    assert native.serves(architectures, capability) is served


def test_the_cuda_library_registers_the_pixel_losses():
    """Under the operators' own names; what it has no kernels for takes another way (`able` of its operator)."""
    found = list(PACKAGE.glob("libhetero_kernels_cuda*"))
    if not found or not torch.version.cuda:
        pytest.skip("no CUDA library was built")
    torch.ops.load_library(str(found[0]))
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(registered(f"hetero_kernels::{name}", "CUDA") for name in ("hakd_loss", "segmentation_loss"))
    assert registered("hetero_kernels::projected_hakd_loss", "CUDA") == ("cuda" in projected_losses.able(19))


def test_the_cuda_library_has_a_cuda_runtime_of_its_own():
    """And needs nothing of torch's: that may be an older one than nvcc's, and the library asks for nvcc's symbols."""
    found = list(PACKAGE.glob("libhetero_kernels_cuda*"))
    if not found or shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("no CUDA library was built, or there is no nm")
    listed = subprocess.run(["nm", "-D", found[0]], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert "aoti_torch_get_current_cuda_stream" in names  # streams come from torch
    assert [name for name in names if re.match(r"_*(cuda|cu)[A-Z]", name)] == []  # neither asked for nor offered
    needed = subprocess.run(["readelf", "-d", found[0]], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed and "libcuda" not in needed


def test_no_library_names_a_folder_of_the_machine_that_built_it():
    """Which its messages would show to whoever installed a wheel."""
    for library in Path(native.__file__).parent.glob("*.so"):
        assert not re.findall(rb"(?<![\w.])/[\w./-]*csrc/[\w./-]+", library.read_bytes()), library
