import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hetero_kernels import native
from hetero_kernels.ops import backends
from hetero_kernels.options import BACKENDS

sys.path.insert(0, str(Path(__file__).parent))
# For `benchmarks`, wherever pytest was started; last, so that an installed hetero_kernels is what is tested.
sys.path.append(str(Path(__file__).parent.parent))
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.quicken()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # of two cores


# What takes a minute begins first, so that no process waits for another at the end.
LONG = (
    "test_sanitizers.py", "test_mutations.py", "test_compiled_pixel_losses.py", "test_examples.py", "test_torchrun.py",
    "test_interruption.py", "test_cli.py", "test_export.py", "test_engine.py", "test_distributed.py",
    "test_documentation.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: looking through it again and again for garbage is a tenth of a run."""
    gc.collect()
    gc.freeze()


def fused_backends() -> list[str]:
    """Every backend this machine can run, the CPU's once per instruction set: "cpu", "cpu:avx2", ..."""
    names = [b for b in BACKENDS if b != "reference" and backends.unavailable(b) is None]
    host = native.host_module()
    return names + [f"cpu:{isa}" for isa in (host.instruction_sets()[1:] if host and "cpu" in names else [])]


def _select(parameter: str, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = parameter.partition(":")
    if isa:
        monkeypatch.setenv("HETERO_KERNELS_CPU_ISA", isa)
    return name


@pytest.fixture(params=fused_backends())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name to pass as ``backend=``; the test runs once for each fused one that is here."""
    return _select(request.param, monkeypatch)


@pytest.fixture(params=["reference", *fused_backends()])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As ``backend``, the reference too."""
    return _select(request.param, monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def one_parser() -> None:
    """The command line's options are taken from their classes once, not again whenever a test calls ``main``: that is a
    third of a run of a few steps."""
    if cli := sys.modules.get("heteroakd.cli"):
        cli.build_parser = functools.cache(cli.build_parser)


@pytest.fixture
def uninitialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks keep what is in their memory: random values for hundreds of millions of weights take seconds."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *arguments, **options: tensor)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.mix_transformer.trunc_normal_", lambda *a, **k: None)


@pytest.fixture
def one_block_in_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of encoders: every layer takes its time, and a stage's second block has none that its first has not."""
    from segmentation_models_pytorch.encoders import encoders

    for name, blocks in (("resnet18", "layers"), ("mit_b0", "depths")):
        assert encoders[name]["params"][blocks] == [2] * 4
        monkeypatch.setitem(encoders[name]["params"], blocks, [1] * 4)
