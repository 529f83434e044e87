"""What the packaging tests share: clean copies of the tree, and the environment with the oldest torch that we name."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from installing import OLDEST_TORCH, ROOT


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for all tests with the oldest torch, as one of them installs into it; first, as they take longest."""
    first = [item for item in items if "oldest_torch" in getattr(item, "fixturenames", ())]
    for item in first:
        item.add_marker(pytest.mark.xdist_group("oldest torch"))
    if all(item.path.is_relative_to(Path(__file__).parent) for item in items):
        items.sort(key=lambda item: item not in first)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A clean copy of the tree, as a clone would have it."""
    copy = tmp_path_factory.mktemp("source") / "hetero-kernels"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture
def no_kernels(source, tmp_path) -> Path:
    """A copy of the tree that is built in seconds: of the sources only the host module's have anything in them."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    host = {Path(name).name for name in re.search(r"pybind11_add_module\(_host\s([^)]*)\)", cmake)[1].split()}
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    for path in (tree / "csrc").rglob("*.c*"):
        if path.suffix in (".cpp", ".cu") and path.name not in host:
            path.write_text("")
    return tree


@pytest.fixture(scope="session")
def oldest_torch() -> Path:
    """The python of the environment with the oldest torch, which is part of the set-up."""
    folder = Path(sys.prefix, f"torch-{OLDEST_TORCH}")
    assert (folder / "installed").exists(), f"make {folder.relative_to(ROOT)}/installed, from the sources' folder"
    return folder / "bin" / "python"
