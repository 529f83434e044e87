"""torch.compile's cache on disk and this package's own formulas, which it does not know."""

import os
import shutil
from pathlib import Path

import processes
import pytest
import torch

import hetero_kernels
from hetero_kernels.ops import backends, library

# What functional.hakd_loss calls, without the scalars' packing, for which a compiler would run.
STEP = """
import torch
import torch._inductor.config
from hetero_kernels import functional
from hetero_kernels.ops.library import pack_scalars
from hetero_kernels.ops.pixel_losses import _differentiable_hakd
torch._inductor.config.cpp_cache_precompile_headers = False  # for one kernel
functional.backends.select("cpu", "cpu")
def step(student, teacher, labels, scalars):
    options = (True, "class", "kl", "label", False, 255, "mean", True, False)
    return _differentiable_hakd["cpu"](student, teacher, labels, scalars, None, None, None, *options)[0]
torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
labels = torch.randint(0, 3, (2, 8, 8))
loss = torch.compile(step, fullgraph=True)(student, teacher, labels, pack_scalars(1.0, 1.0, 0.0))
loss.backward(torch.tensor(2.0))
print(loss.item(), student.grad.norm().item())
"""


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
def test_two_versions_share_a_cache(tmp_path):
    """Of which the second forgets the upstream gradient."""
    package = Path(hetero_kernels.__file__).parent
    results = []
    for version in ("first", "second"):
        copy = tmp_path / version / "hetero_kernels"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*cuda*"))
        if version == "second":
            formulas = copy / "ops" / "pixel_losses.py"
            source = formulas.read_text()
            changed = source.replace("scale_saved(ctx, g, factor, x)", "scale_saved(ctx, g, None, x)")
            assert changed != source
            formulas.write_text(changed)
        environment = {
            **os.environ, "PYTHONPATH": str(copy.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        }  # fmt: skip
        run = processes.run("-c", STEP, env=environment, cwd=copy.parent)
        assert run.returncode == 0, run.stderr
        results.append([float(x) for x in run.stdout.split()])
        assert any((tmp_path / "cache" / "aotautograd").rglob("*")) and any((tmp_path / "cache" / "fxgraph").rglob("*"))
    (loss, doubled), (same, gradient) = results
    assert loss == same and doubled == pytest.approx(2 * gradient)


def test_every_operator_says_whose_it_is():
    """As its last argument, without a default: an argument at its default is not in a graph."""
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{library.NAMESPACE}::")}
    assert len(names) >= 9
    for name in names:
        last = getattr(torch.ops.hetero_kernels, name.partition("::")[2]).default._schema.arguments[-1]
        assert last.name == "sources" and not last.has_default_value(), name


def test_digest_is_of_version_and_sources(monkeypatch, tmp_path):
    def digest(version="1.0", source="x = 1"):
        (tmp_path / "ops").mkdir(exist_ok=True)
        (tmp_path / "ops" / "formulas.py").write_text(source)
        monkeypatch.setattr(library, "__file__", str(tmp_path / "ops" / "library.py"))
        monkeypatch.setattr(library.metadata, "version", lambda name: version)
        return library.digest.__wrapped__()

    assert digest() == digest()
    assert len({digest(), digest(version="1.1"), digest(source="x = 2")}) == 3
