"""Who may look at what, how long a file may be, and what the tree must not hold."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "hetero_kernels"
# What each part may import of ours, besides the standard library and packages.
MAY_IMPORT = {
    "reference": set(),
    "options": set(),
    "native": set(),
    "arguments": set(),
    "layout": set(),
    "ops": {"layout", "native", "options", "ops", "triton"},
    "triton": {"layout", "triton", "options"},
    "functional": {"arguments", "reference", "ops", "options"},
    "projection": {"ops", "reference"},
    "loss": {"arguments", "functional", "options", "projection", "reference"},
    "taps": {"arguments"},
    "distributed": set(),
    "distiller": {"arguments", "loss", "reference", "taps"},
    "config": {"native", "ops", "options"},
    "__init__": {"functional", "reference", "config", "distiller", "distributed", "loss", "ops"},
}


def imported_parts(path: Path, source: str | None = None) -> set[str]:
    """Modules and subpackages of hetero_kernels that a file (or ``source`` in its place) imports."""
    parts = set()
    package = path.relative_to(KERNELS).parts[:-1]
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                inside = (*base, *(node.module.split(".") if node.module else ()))
                names = [(*inside, a.name) for a in node.names] if not node.module else [inside]
                parts |= {name[0] for name in names}
            elif node.module and node.module.split(".")[0] == "hetero_kernels":
                parts |= {node.module.split(".")[1]} if "." in node.module else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hetero_kernels.")}
    return parts


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_layers(path):
    part = path.relative_to(KERNELS).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} has no place in the house yet: say here what it may import"
    assert imported_parts(path) <= MAY_IMPORT[part]
    assert "heteroakd" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """A path of modules that ends where it began."""

    def search(path: list[str]) -> list[str] | None:
        for name in sorted(imports.get(path[-1], ())):
            if name in path:
                return [*path[path.index(name) :], name]
            if found := search([*path, name]):
                return found
        return None

    return next((found for name in imports if (found := search([name]))), None)


def test_benchmarks_import_in_no_circle():
    """Imports within functions and for types, too."""
    folder = KERNELS.parent / "benchmarks"
    imports: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        names = imports.setdefault(".".join(parts), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = parts[: len(parts) - node.level]
                inside = (*base, *(node.module.split(".") if node.module else ()))
                names |= {".".join(inside), *(".".join((*inside, a.name)) for a in node.names)}
    assert imports["gpu_static"] >= {"cuda_static", "triton_static"} and "gpu_check.chapter" in imports["report"]
    assert circle(imports) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_layer_test_sees_imports():
    """The check above would notice a backend that imports the reference, however it is written."""
    for line in ("from ..reference import mix", "from .. import reference", "from hetero_kernels import reference",
                 "import hetero_kernels.reference", "from hetero_kernels.reference import mix"):  # fmt: skip
        assert "reference" in imported_parts(KERNELS / "triton" / "planted.py", line), line


def test_backends_and_emulation_never_name_the_reference():
    for folder in (KERNELS / "triton", ROOT / "tests" / "emulation", ROOT / "csrc"):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                assert not re.search(r"(import|from|hetero_kernels\.)\s*reference\b", path.read_text()), path
    assert "reference" not in (KERNELS / "native.py").read_text()


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


CSRC = ROOT / "csrc"
# What the parts of csrc/cpu and csrc/cuda may include besides themselves; "" are the files of csrc/ itself. A loss on
# features evaluates the pixel losses while the features are at hand, so that stem looks at the other; in CUDA it reads
# features as the projection does.
MAY_INCLUDE = {
    "core": {"pixel", ""},
    "pixel_losses": {"core", "pixel", ""},
    "projected_losses": {"pixel_losses", "projection", "core", "pixel", ""},
    "projection": {"core", "pixel", ""},
    "torch": {"projected_losses", "pixel_losses", "projection", "core", "pixel", ""},
}


def place(path: Path) -> tuple[str, str]:
    """Library ("cpu", "cuda" or "") and part of a file of csrc/."""
    folders = path.relative_to(CSRC).parts[:-1]
    return (folders[0], "/".join(folders[1:])) if folders[:1] in (("cpu",), ("cuda",)) else ("", "/".join(folders))


def wrong_includes(path: Path, source: str | None = None) -> list[str]:
    """What a file of csrc/ (or ``source`` in its place) includes and must not."""
    library, part = place(path)
    wrong = []
    for name in re.findall(r'#include ["<]([^">]+)[">]', source or path.read_text()):
        if name.startswith(("torch/", "ATen/", "c10/")):
            registration = part == "torch" or path == CSRC / "torch_ops.h"
            wrong += [] if registration else [name]
            continue
        included = next((p for p in ((path.parent / name).resolve(), CSRC / name) if p.exists()), None)
        if included is None or path == CSRC / "module.cpp":
            continue  # a system's header; the host module looks at both libraries
        other = place(included)
        allowed = {("", other_part) for other_part in ("", "pixel")} if not library else set()
        if part == "pixel":
            allowed = {("", "pixel")}
        if library:
            allowed |= {(library if p in MAY_INCLUDE else "", p) for p in {part, *MAY_INCLUDE[part]}}
        wrong += [] if other in allowed else [name]
    return wrong


def test_cpp_layers():
    """torch -> stems -> core -> pixel, never back, no library at the other; torch's headers in registrations only."""
    for path in CSRC.rglob("*.[hc]*"):
        library, part = place(path)
        assert not library or part in MAY_INCLUDE, f"{path} has no place in the house yet: say here what it may include"
        assert not wrong_includes(path), path


def test_the_cpp_layer_test_sees_includes():
    for file, include in (
        ("cpu/core/planted.h", "../pixel_losses/problem.h"),
        ("cpu/core/planted.h", "../../cuda/core/types.h"),
        ("cpu/pixel_losses/planted.h", "../projected_losses/projected_problem.h"),
        ("cuda/pixel_losses/planted.cu", "torch/csrc/stable/tensor.h"),
        ("cuda/core/planted.cuh", "../pixel_losses/tiles.h"),
        ("pixel/planted.h", "../arguments.h"),
    ):
        assert wrong_includes(CSRC / file, f'#include "{include}"') == [include], (file, include)
    assert not wrong_includes(CSRC / "cpu/torch/planted.cpp", '#include "torch_ops.h"\n#include <torch/library.h>')


def test_no_file_grows_past_its_readers():
    for path in tracked_files():
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            lines = len(path.read_text().splitlines())
            assert lines <= 480, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_large_or_built_files_are_tracked():
    for path in tracked_files():
        assert path.stat().st_size <= 2**20, path
        assert path.suffix not in (".so", ".pth", ".pt", ".pyc", ".o"), path


TRAINER = ROOT / "python" / "heteroakd"
FLOORS = ("config", "system", "data", "networks", "methods", "evaluation", "training", "report", "commands", "cli")
"""Each imports only from itself and what stands before it."""
TRAINER_LINES, TRAINER_TEXTS = 7938, 390  # of Python; of templates and tables


def trainer_imports(path: Path, source: str | None = None) -> set[str]:
    """Folders of the trainer, or "cli", that a file (or ``source`` in its place) imports."""
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "heteroakd" else [node.module or ""]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("heteroakd.")}
    return found


def test_the_trainers_folders_import_what_stands_above():
    for path in TRAINER.rglob("*.py"):
        part = path.relative_to(TRAINER).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            assert part in FLOORS, f"{part} has no place in the trainer yet: say in FLOORS where it stands"
            wrong = trainer_imports(path) - set(FLOORS[: FLOORS.index(part) + 1])
            assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_the_trainers_import_test_sees_imports():
    lines = (
        "from heteroakd.training.log import RunLog",
        "import heteroakd.training.log",
        "from heteroakd import training",
    )
    for line in lines:
        assert trainer_imports(TRAINER / "planted.py", line) == {"training"}, line


def test_the_trainer_is_thin():
    """No folder above 12 modules, no file above 300 lines, and a third of what is there is there to be read."""
    lines, told = 0, 0
    for folder in {path.parent for path in TRAINER.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 12, folder
        for path in folder.glob("*.py"):
            text = path.read_text()
            assert text.count("\n") <= 300, path
            lines += text.count("\n")
            told += sum(not line.strip() or line.strip().startswith("#") for line in text.splitlines())
            told += sum(
                (node.end_lineno or 0) - node.lineno + 1
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            )
    assert lines <= TRAINER_LINES, lines
    texts = [path for ending in ("*.j2", "*.yaml") for path in TRAINER.rglob(ending)]
    assert sum(len(path.read_text().splitlines()) for path in texts) <= TRAINER_TEXTS
    assert told >= 0.3 * lines, told / lines


def run_program(program: str) -> str:
    """What a Python of its own prints with this tree on its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_help_and_wrong_options_of_the_trainer_import_no_torch():
    program = (
        "import sys\n"
        "from heteroakd.cli import main\n"
        "for arguments in (['--help'], ['distill', '--help'], ['distill', '--no', '1'], ['demo', '--steps', 'x']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    run_program(program)


def test_the_losses_import_nothing_but_torch():
    """`import hetero_kernels` costs little more than `import torch`: no compiler, no Triton, no package of another."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import hetero_kernels\n"
        "print(*(name for name in sys.modules if name not in before and name.split('.')[0] != 'hetero_kernels'))\n"
        "from hetero_kernels.ops.library import constant_when_traced\n"
        "ours, torchs = (mark(lambda: 0) for mark in (constant_when_traced, torch.compiler.assume_constant_result))\n"
        "assert vars(ours) == vars(torchs) != {}\n"
        "assert 'torch._dynamo' in sys.modules\n"  # which is what the names above would have had in them
    )
    assert run_program(program).split() == []
