"""Installation as users do it: wheel, source distribution, with and without build isolation, without torch; and one
build under the oldest torch. Slow: it compiles."""

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from installing import OLDEST_TORCH, ROOT, make_environment, run

import hetero_kernels
from hetero_kernels import native


def test_wheel_without_build_isolation(source, tmp_path):
    out = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, source),
        HETERO_KERNELS_CUDA="0",
    )
    assert "no CUDA library (HETERO_KERNELS_CUDA=0)" in out
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    trainer = [path for path in (source / "python" / "heteroakd").rglob("*") if path.suffix not in ("", ".pyc")]
    wanted = {str(path.relative_to(source / "python")) for path in trainer}
    assert {Path(name).suffix for name in wanted} == {".py", ".typed", ".txt", ".j2", ".yaml"}
    assert {"hetero_kernels/py.typed", *wanted} <= {*names}
    assert any(n.startswith("hetero_kernels/libhetero_kernels_cpu.") for n in names)
    assert any(n.startswith("hetero_kernels/_host.") for n in names)
    assert not any("cuda" in n and n.endswith(".so") for n in names)
    assert not any(n.startswith(("tests/", "benchmarks/", "build/")) for n in names)


def test_source_distribution_installs_against_the_environments_torch(source, oldest_torch, tmp_path):
    """With build isolation, which hides that torch from import; and without bringing a second one. The CPU part: the
    set-up of these tests has compiled the CUDA part, whose sources are there."""
    run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    for folder in ("csrc", "hetero_kernels", "python/heteroakd"):
        files = {str(path.relative_to(source)) for path in (source / folder).rglob("*.*") if path.is_file()}
        assert files and files <= packed, sorted(files - packed)
    try:
        out = run(oldest_torch, "-m", "pip", "install", "-v", sdist, cwd=tmp_path, HETERO_KERNELS_CUDA="0")
        assert f"building against torch {OLDEST_TORCH}" in out
        shown = run(oldest_torch, "-c", "import hetero_kernels; hetero_kernels.show_config()", cwd=tmp_path)
    finally:  # the environment stays
        run(oldest_torch, "-m", "pip", "uninstall", "-y", "-q", "hetero-kernels")
    assert f", torch {OLDEST_TORCH}" in shown, shown  # no other has come with it
    assert "cpu        available" in shown and f"build: torch {OLDEST_TORCH}" in shown
    assert "cuda       not available: the CUDA library was not built: HETERO_KERNELS_CUDA=0" in shown


def test_one_build_serves_another_torch(oldest_torch, tmp_path):
    """Stable ABI: the very files built against the newer torch pass the CPU tests under the older one, and the CUDA
    library loads there, whatever that torch's CUDA. Without what the same code answers the same under any torch, as it
    asks none: other instruction sets, the kernels' accuracy and mathematics at special values, offsets beyond 31 bits,
    what is allocated; and of what is compiled each value of an option once, not each pair."""
    package = Path(hetero_kernels.__file__).parent
    built_with = hetero_kernels.native.host_module().build_info()["torch"]
    shutil.copytree(package, tmp_path / "hetero_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("tests", "benchmarks"):  # of which tests import one
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "packaging"))
    tests = [f"tests/test_{name}.py" for name in ("pixel_losses", "edges", "ops", "loss")]
    assert built_with.split("+")[0] != OLDEST_TORCH
    shown = run(oldest_torch, "-c", "import hetero_kernels; hetero_kernels.show_config()", cwd=tmp_path)
    for expected in (f"torch {OLDEST_TORCH}", f"build: torch {built_with}", "cpu        available"):
        assert expected in shown
    special = "(temperatures_around or very_sure or large_logits or accuracy_is_absolute)"
    left_out = f"cpu: or ({special} and not reference) or more_than_two_to_the_31 or no_tensor_of_the_loss_grid"
    code = f"not ({left_out} or (compile_fullgraph and (mean-True or none-False)))"
    options = ("-q", "-n", "2", "-p", "no:cacheprovider", "-k", code)
    out = run(oldest_torch, "-m", "pytest", *options, *tests, cwd=tmp_path)
    assert " passed" in out and "failed" not in out
    if list(package.glob("libhetero_kernels_cuda*")):
        script = "import torch; from hetero_kernels import native; print(torch.version.cuda and native._load('cuda'))"
        assert run(oldest_torch, "-c", script, cwd=tmp_path).endswith(("problem=None)\n", "None\n"))
    print(f"built with {built_with}, ran under {OLDEST_TORCH}: {out.splitlines()[-1]}")


def test_without_torch_the_message_says_what_to_do(source, tmp_path):
    python = make_environment(tmp_path / "env")
    out = run(python, "-m", "pip", "install", "--no-deps", source, check=False)
    assert "Install torch >= 2.10 first" in out and "HETERO_KERNELS_TORCH_DIR" in out
    assert "hetero-kernels" not in run(python, "-m", "pip", "list")


NVCC = {  # what it prints, and what the build says of it
    "old": ("Cuda compilation tools, release 11.2, V11.2.67", "is CUDA 11.2, and C\\+\\+20 needs 12.0"),
    "another": ("Cuda compilation tools, release 99.1, V99.1.1", "is CUDA 99.1, torch .* major versions must agree"),
    "broken": ("nothing", "does not run"),
}


def fake_nvcc(folder: Path, says: str) -> dict[str, str]:
    """The variables with which an nvcc is found that prints this and does no more."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder), "PATH": f"{nvcc.parent}:{os.environ['PATH']}"}


def build(tree: Path, tmp_path: Path, **environment: str) -> str:
    """What `setup.py build_ext` prints, successful or not."""
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run(sys.executable, "setup.py", "-q", "build_ext", *folders, cwd=tree, check=False, **environment)


@pytest.mark.parametrize("kind", NVCC)
def test_what_keeps_cuda_from_being_built_is_said_in_one_message(source, tmp_path, kind):
    says, expected = NVCC[kind]
    out = build(source, tmp_path, HETERO_KERNELS_CUDA="1", **fake_nvcc(tmp_path, says))
    last = out.strip().splitlines()[-1]
    begin = "hetero-kernels: HETERO_KERNELS_CUDA=1 insists on the CUDA library: "
    assert re.match(f"{begin}.*{expected}$", last), out[-2000:]


def test_a_build_folder_that_stays(no_kernels, tmp_path):
    """Compiles only what has changed since, with the nvcc and the ninja that are there now (an isolated one's go)."""
    ninja = Path(sys.executable).with_name("ninja").resolve()
    for kind in ("old", "another"):
        says, expected = NVCC[kind]
        stays = {"HETERO_KERNELS_BUILD_DIR": str(tmp_path / "stays"), **fake_nvcc(tmp_path / kind, says)}
        (tmp_path / kind / "bin" / "ninja").symlink_to(ninja)
        out = build(no_kernels, tmp_path, **stays)
        (tmp_path / kind / "bin" / "ninja").unlink()
        assert "labels.cpp.o" in out and ("plan.cpp.o" in out) == (kind == "old"), out[-2000:]
        assert re.search(f"no CUDA library .*{expected}", out), out[-2000:]
        (no_kernels / "csrc" / "cpu" / "pixel_losses" / "labels.cpp").write_text("int changed;\n")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_default_architectures_are_built_for_and_named(source, tmp_path):
    """The configuration of a plain `pip install .` beside CUDA; of the code only what says so: kernels take minutes."""
    import pybind11

    folder = Path(torch.__file__).parent
    options = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(), "HK_TORCH_DIR": folder,
               "HK_TORCH_VERSION": torch.__version__, "HK_TORCH_CUDA": torch.version.cuda, "HK_CUDA": "ON"}  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # pip's cmake and ninja, where the system has none
    settings = (f"-D{name}={value}" for name, value in options.items())
    run("cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", *settings, PATH=path)
    run("cmake", "--build", tmp_path, "--target", "_host", PATH=path)
    out = run(sys.executable, "-c", "import _host; print(_host.build_info()['cuda_architectures'])", cwd=tmp_path)
    assert out.split()[:4] == ["80-real", "86-real", "89-real", "90-real"] or out.split()[-1] == "90"
    assert native.serves(out, (8, 6)) and native.serves(out, (9, 0)) and native.serves(out, (13, 0))


def test_a_compiler_that_fails_is_said_in_one_message(source, tmp_path):
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    (broken / "csrc" / "cpu" / "pixel_losses" / "labels.cpp").write_text("#error planted\n")
    out = build(broken, tmp_path, HETERO_KERNELS_CUDA="0")
    last = out.strip().splitlines()[-1]
    assert last.startswith("hetero-kernels: the build failed:") and "planted" in last and "C++20" in last, out[-2000:]


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_cpu_sources_compile_elsewhere(compiler, tmp_path):
    """The loops are compiler vector extensions and nothing of x86: another compiler, another processor."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    elsewhere = ("_avx2", "_avx512", "_ops")  # x86, torch
    for source in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")):
        if source.stem.endswith(elsewhere):
            continue
        out = run(compiler, "-std=c++20", "-O1", "-Wall", "-Wno-psabi", "-c", source, "-o", tmp_path / "object.o")
        assert "warning" not in out, out
