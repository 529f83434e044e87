"""Links of the documentation, and the site that is made of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hetero_kernels

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests/README.md"]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Git hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {title.strip().replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    """What links of a page lead to nothing."""
    broken = []
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_the_link_test_sees_links():
    text = "[a](docs/none.md) [b](docs/trainer.md#none) [c](#none) [d](docs/trainer.md#models-of-your-own) [e](docs)"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/trainer.md#none", "#none"]


def test_the_site_is_made_of_all_there_is(tmp_path):
    """`make docs`: strict, so that a link or anchor to nothing ends it; every public name is in the reference."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material and mkdocstrings (make docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    reference = "".join(path.read_text() for path in tmp_path.glob("api/*/index.html"))
    public = {*hetero_kernels.__all__} - {"functional", "reference"} | {"options.HakdOptions", "functional.hakd_loss"}
    assert not [name for name in public if f'id="hetero_kernels.{name}"' not in reference]
    assert not re.search(r":(class|func|meth):", reference)
    mathematics = (tmp_path / "mathematics/index.html").read_text()
    assert '<li><code>resolution="label"</code>' in mathematics  # a list after a line of text
    assert (tmp_path / "examples/huggingface_trainer/index.html").exists()
