"""The documentation site (`make docs`): what is in the repository, without a second copy of anything.

README is its first page; examples, changelog and the tests' README are pages, and so is the API, from the docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
API = {
    "distiller": ("Distiller", ["Distiller", "DistillerOutput", "MeanOverTaps"]),
    "losses": (
        "Losses",
        ["HeteroAKDLoss", "HeteroAKDOutput", "SegmentationLoss", "PixelProjector"]
        + ["options.HakdOptions", "options.SegmentationOptions"],
    ),
    "functional": (
        "Functions",
        [f"functional.{name}" for name in ("hakd_loss", "segmentation_loss", "projected_hakd_loss", "hakd_maps")],
    ),
    "backends": (
        "Processes and backends",
        ["mean_over_processes", "check_replicas", "show_config", "available_backends", "select_backend"],
    ),
}
"""Page -> title and what it documents of ``hetero_kernels``."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    for uri, content in pages().items():
        files.append(File.generated(config, uri, content=content))
    return files


def pages() -> dict[str, str]:
    """Text of each page that is no file of docs/, by its path in the site."""
    found = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "tests.md": (ROOT / "tests/README.md").read_text(encoding="utf-8").replace("](../docs/", "]("),
    }
    found["index.md"] = found["index.md"].replace("](examples)", "](frameworks.md)")
    for path in sorted((ROOT / "examples").glob("*.py")):
        found[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
    for page, (title, names) in API.items():
        found[f"api/{page}.md"] = f"# {title}\n\n" + "\n".join(f"::: hetero_kernels.{name}\n" for name in names)
    return found


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Links that lead out of docs/ lead to the pages above; lists need no empty line before them, as elsewhere."""
    markdown = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples/\1.md)", markdown)
    markdown = markdown.replace("](../examples)", "](frameworks.md)").replace("](../tests/README.md)", "](tests.md)")
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    begins = re.compile(r"^(?![-\s#|]|\d+\. )(.+)\n(?=- |\d+\. )", re.M)
    return "".join(part if number % 2 else begins.sub(r"\1\n\n", part) for number, part in enumerate(parts))


class Roles(griffe.Extension):
    """Docstrings' ``:class:`X` `` is code in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **given: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:(`[^`]+`)", r"\1", obj.docstring.value)
