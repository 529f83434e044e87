"""The Triton kernels without a GPU: ``make test-triton`` runs this folder twice.

With TRITON_INTERPRET=1 set before Triton is imported its interpreter executes them on the CPU; without, they are
compiled ahead of time. The rest of the suite is touched by neither.
"""

import os

import pytest

_INTERPRETED = "test_interpreted_*.py"
_COMPILED = ["test_compiled.py", "test_mutations.py"]
collect_ignore_glob = _COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else [_INTERPRETED]


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
