"""A part of the emulated tests again, under the address and undefined-behaviour sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build

FOLDER = Path(__file__).parent
# All losses at every shape, guarded and unguarded, with strides, labels and dtypes that are read in their own ways.
CHOSEN = {
    "test_emulated_pixel_losses.py": "((_shapes and not thousand) or large_logits or strides or test_labels or half)"
    " and not orders",
    # Every layout with every size and every dtype: three kernels without optimization take a second with size3.
    "test_emulated_labels.py": "layouts and (size0 or (size1 and dtype0) or (size2 and dtype1) or (size3 and dtype2))",
    "test_emulated_projection.py": "test_layouts or normalized_shapes or (other_shapes and one)",
    "test_emulated_projected_losses.py": "other_shapes or runs_that or networks_differ or logits_of_any or test_labels",
}


def sanitized_run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    environment = {**os.environ, **build.sanitizer_environment()}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)


@pytest.fixture(scope="module", autouse=True)
def runtime():
    if sanitized_run("-c", "pass").returncode:
        pytest.skip("the compiler's sanitizers do not start here")


@pytest.mark.parametrize("file", CHOSEN)
def test_no_sanitizer_complains(file):
    done = sanitized_run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", CHOSEN[file])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_the_sanitizers_are_there():
    """An access that the emulation is not told of."""
    script = "import sys; sys.path.insert(0, '..'); import emulation; emulation.module().selftest('wild_write')"
    done = sanitized_run("-c", script)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
