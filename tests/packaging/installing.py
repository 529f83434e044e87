"""Running commands as a user does, in environments of their own."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("HETERO_KERNELS", "PYTHONPATH"))}
ENVIRONMENT["CMAKE_CXX_COMPILER_LAUNCHER"] = f"{sys.executable};{Path(__file__).with_name('kept_objects.py')}"
REQUIRED_TORCH = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
OLDEST_TORCH = f"{REQUIRED_TORCH[1]}.0"  # of those that pyproject.toml allows


def run(*command: object, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
    """What the command prints; asserts that it succeeds."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env={**ENVIRONMENT, **environment}
    )
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def make_environment(folder: Path) -> Path:
    """The python of a fresh virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"
