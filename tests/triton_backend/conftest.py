"""The Triton kernels without a GPU: ``make test-triton`` runs this folder twice.

With TRITON_INTERPRET=1 set before Triton is imported its interpreter executes them on the CPU; without, they are
compiled ahead of time. The rest of the suite is touched by neither.
"""

import os
import shutil
import tempfile

import pytest

_INTERPRETED = "test_interpreted_*.py"
_COMPILED = ["test_compiled.py", "test_options.py", "test_mutations.py", "test_recompilations.py"]
collect_ignore_glob = _COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else [_INTERPRETED]


def pytest_configure(config: pytest.Config) -> None:
    """A run compiles a kernel once, for all its processes, and finds none that another run has left."""
    if not hasattr(config, "workerinput"):
        os.environ["TRITON_CACHE_DIR"] = config.triton_cache = tempfile.mkdtemp(prefix="triton-")  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    if cache := getattr(config, "triton_cache", None):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that the test launches, in order."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run = InterpretedFunction.run

    def record(self, *args, grid, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return names
