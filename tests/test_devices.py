"""Which backend runs on which device: machines with GPUs of several kinds, forked processes, and none at all."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch

import hetero_kernels
from hetero_kernels import native
from hetero_kernels.ops import backends

BUILT = {"torch": "2.14.1", "compiler": "GNU 12", "cuda": "13.0", "cuda_architectures": "90-real 120", "no_cuda": ""}


@pytest.fixture
def machine(monkeypatch):
    """A machine with these GPUs (name, compute capability), the first one current, and this build."""
    caches = (native.library, native._no_code_for, backends._automatic, backends.warn_once)

    def pretend(*gpus, build=BUILT):
        host = SimpleNamespace(
            build_info=lambda: dict(build), active_instruction_set=lambda: "avx2", instruction_sets=lambda: ["avx2"]
        )
        monkeypatch.setattr(native, "host_module", lambda: host)
        monkeypatch.setattr(native, "_load", lambda name: native.Library(Path(f"lib{name}.so"), None))
        monkeypatch.setattr(backends, "_triton_problem", lambda: None)
        answers = {
            "is_available": lambda: bool(gpus), "device_count": lambda: len(gpus), "current_device": lambda: 0,
            "get_device_name": lambda device: gpus[device][0], "get_device_capability": lambda device: gpus[device][1],
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        for cache in caches:
            cache.cache_clear()

    yield pretend
    for cache in caches:
        cache.cache_clear()


T4, H100 = ("Tesla T4", (7, 5)), ("NVIDIA H100", (9, 0))


def test_an_older_gpu_falls_back_to_triton_with_one_warning(machine):
    """The CUDA library is left alone, its reason is said, and the automatic choice is the next backend."""
    machine(T4, T4)
    expected = "runs its 'triton' backend for cuda tensors .*Tesla T4 has compute capability 7.5, .*for 90-real 120"
    with pytest.warns(RuntimeWarning, match=expected):
        assert backends.select(None, "cuda") == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(None, "cuda") == backends.select(None, "cuda:1") == "triton"
    assert "Tesla T4" in backends.unavailable("cuda")


def test_each_gpu_is_judged_for_itself(machine, monkeypatch, capsys):
    machine(T4, H100)
    assert hetero_kernels.available_backends("cuda:0") == ("triton", "reference")
    assert hetero_kernels.available_backends("cuda:1") == ("cuda", "triton", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(None, "cuda:1") == backends.select("cuda", "cuda:1") == "cuda"
    with pytest.warns(RuntimeWarning, match="Tesla T4"):
        assert backends.select(None, "cuda:0") == "triton"
    with pytest.raises(RuntimeError, match="backend='cuda' was asked for but is not available: Tesla T4"):
        backends.select("cuda", "cuda:0")
    assert backends.select_among(("cpu", "cuda"), None, "cuda:1") == "cuda"
    assert backends.select_among(("cpu", "cuda"), None, "cuda:0") == "triton"
    # "cuda" is the current one, whichever that is by now.
    assert backends.select(None, "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backends.select(None, "cuda") == "cuda" == hetero_kernels.available_backends("cuda")[0]
    hetero_kernels.show_config()
    shown = capsys.readouterr().out
    assert "cuda       available" in shown and "not for cuda:0: Tesla T4 has" in shown and "not for cuda:1" not in shown


def test_the_compilers_error_is_shown_where_it_is_missed(machine, capsys):
    """pip hides what a build prints."""
    reason = "it does not compile here: csrc/cuda/card.cu(3): error: planted"
    machine(H100, build={**BUILT, "cuda": "", "cuda_architectures": "", "no_cuda": reason})
    with pytest.warns(RuntimeWarning, match=r"the CUDA library was not built: .*card.cu\(3\): error: planted"):
        assert backends.select(None, "cuda:0") == "triton"
    hetero_kernels.show_config()
    assert f"cuda       not available: the CUDA library was not built: {reason}" in capsys.readouterr().out


def script(text: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = processes.run("-c", text, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


CPU_CALLS = """
import torch, hetero_kernels
from hetero_kernels import functional
torch.set_num_threads(1)

def call():
    logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 8, 8, dtype=torch.long)
    features, weight = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(3, 5)
    for backend in (None, "cpu"):
        functional.hakd_loss(logits, logits.detach(), labels, backend=backend).backward()
        functional.segmentation_loss(logits, labels, backend=backend).backward()
        functional.projected_hakd_loss(
            features, features.detach(), weight, weight, labels, resolution="feature", backend=backend).backward()
    assert hetero_kernels.available_backends("cpu") == ("cpu", "reference")
    assert hetero_kernels.select_backend(None, "cpu") == "cpu"
"""


def test_a_cpu_call_asks_nothing_of_cuda():
    """Neither by torch.cuda nor below it: asking initialises CUDA, which costs memory and which a fork can't."""
    out = script(f"""{CPU_CALLS}
import types

def refuse(name):
    def refused(*args, **options):
        raise AssertionError(name + " was called")
    return refused

functions = (types.FunctionType, types.BuiltinFunctionType)
for module, prefix in ((torch.cuda, ""), (torch._C, "_cuda_")):
    for name in dir(module):
        if name.startswith(prefix) and isinstance(getattr(module, name), functions):
            setattr(module, name, refuse(name))
call()
import os
os.environ["TRITON_INTERPRET"] = "1"
if __import__("importlib.util").util.find_spec("triton"):
    assert hetero_kernels.select_backend("triton", "cpu") == "triton"
try:
    torch.cuda.is_available()
except AssertionError as error:
    print(error)
""")
    assert out == "is_available was called\n"


def test_a_forked_worker_whose_parent_has_cuda_uses_the_cpu():
    """torch refuses to begin anew with CUDA there; who asks for the state of things is told so."""
    out = script(f"""{CPU_CALLS}
import os
from types import SimpleNamespace
from hetero_kernels import native

host = native.host_module()
facts = {BUILT}
native.host_module = lambda: SimpleNamespace(build_info=lambda: dict(facts),
    active_instruction_set=host.active_instruction_set, instruction_sets=host.instruction_sets)
native._load = lambda name, load=native._load: native.Library(None, None) if name == "cuda" else load(name)
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
worker = os.fork()
if worker:
    print("worker", os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
else:
    torch.cuda._is_in_bad_fork = lambda: True
    call()
    hetero_kernels.show_config()
    print(flush=True)
    os._exit(0)
""")
    reason = "torch cannot use CUDA here: RuntimeError: Cannot re-initialize CUDA in forked"
    assert f"cuda       not available: {reason}" in out
    assert "cpu        available" in out and out.endswith("worker 0\n")


def test_nothing_needs_a_driver():
    out = script(
        "import torch, hetero_kernels; hetero_kernels.show_config(); print(torch.cuda.is_initialized())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "cuda       not available: " in out and "cpu        available" in out and out.endswith("False\n")
