"""The command `heteroakd`: options from typed dataclasses, YAML files and the command line (jsonargparse)."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, get_loader, set_loader

from heteroakd.config import commands
from heteroakd.config.options import build
from heteroakd.system.signals import StoppedError, reader_may_leave

COMMANDS: dict[str, tuple[type[Any], str]] = {
    "teacher": (commands.TeacherRun, "train a teacher on labels alone"),
    "distill": (commands.DistillRun, "distil a student from a trained teacher: method none, kd, cwd, heteroakd"),
    "compare": (commands.CompareRun, "methods x seeds on one schedule, and a table of means and paired differences"),
    "evaluate": (commands.EvaluateRun, "IoU per class and mIoU of a checkpoint"),
    "predict": (commands.PredictRun, "overlay PNGs of a checkpoint's predictions"),
    "export": (commands.ExportRun, "the network of a checkpoint alone, as a torch.export program or an ONNX model"),
    "report": (commands.ReportRun, "runs and comparisons as one HTML file"),
    "check-data": (commands.CheckDataRun, "count and show a data set, and name what is broken in it"),
    "demo": (commands.DemoRun, "teacher, three students and a report on built-in data, in minutes on two CPU cores"),
}
"""Options and summary of every subcommand; what runs it is imported when it does, so that help and wrong options wait
for no torch."""
TRAINING = ("teacher", "distill")
LISTS: dict[str, Callable[[str], Any]] = {
    "images": str,
    "runs": str,
    "methods": str,
    "seeds": lambda text: int(text) if text.removeprefix("-").isdecimal() else text,  # of others the parser complains
}
"""Options that are lists, and what their values are."""
UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")
"""How the parser says that it does not know an option."""


def _load_yaml(text: str) -> Any:
    """What the parser reads of a file or an option. Raises ValueError for a key that stands twice in a mapping, which
    would drop the first, and for an alias of what it stands in."""
    _check_node(yaml.compose(text, Loader=yaml.SafeLoader), (), set())
    return _load(text)


def _check_node(node: Any, above: tuple[Any, ...], checked: set[Any]) -> None:
    if node in above:
        raise ValueError(f"what begins in line {node.start_mark.line + 1} has an alias of itself in it")
    if node in checked or not isinstance(node, yaml.CollectionNode):
        return
    checked.add(node)
    keys: set[object] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ((None, each) for each in node.value):
        if isinstance(key, yaml.ScalarNode):
            plain = key.tag.endswith((":merge", ":value"))  # << and =, which make nothing
            meant = key.value if plain else yaml.SafeLoader("").construct_object(key)  # 128 and 0x80 are one
            if meant in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"{key.value!r} stands twice in one mapping, the second time in line {line}")
            keys.add(meant)
        _check_node(value, (*above, node), checked)


_load = get_loader("yaml")
set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


class _Parser(ArgumentParser):
    """A parser that names the nearest option where it does not know one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser: ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        if unknown := UNKNOWN.search(message):
            known = parser.get_defaults(skip_validation=True).keys()
            if near := get_close_matches(unknown[1] or unknown[2], known, cutoff=0.75):
                message += f"; did you mean {' or '.join(near)}?"
        super().error(message, ex)


def build_parser() -> ArgumentParser:
    """The parser of the command line: one subcommand per entry of COMMANDS."""
    parser = _Parser(
        prog="heteroakd",
        description="Distil segmentation networks across architectures with HeteroAKD.",
        allow_abbrev=False,
        version=_version(),
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, (config_class, summary) in COMMANDS.items():
        command = _Parser(
            usage=f"heteroakd {name} [--config FILE] [options]; heteroakd {name} --help lists them",
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
        )
        command.add_argument("--config", action="config", help="YAML file of the options below; may be repeated.")
        command.add_class_arguments(config_class)
        if name in TRAINING:
            command.add_argument("--resume", action="store_true", help="Continue the run in the output folder.")
            command.add_argument(
                "--resume_or_start",
                action="store_true",
                help="Continue the run in the output folder, or start it if there is no checkpoint yet.",
            )
            command.add_argument("--overwrite", action="store_true", help="Replace the run in the output folder.")
        subcommands.add_subcommand(name, command, help=summary)
    return parser


def _version() -> str:
    try:
        return version("hetero-kernels")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "(not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error that is printed, 2 for wrong usage, 128 + n
    for a run that signal n stopped.

    With HETEROAKD_DEBUG=1 in the environment errors keep their tracebacks.
    """
    parser = build_parser()
    ordered, files = files_first(gather_lists(sys.argv[1:] if arguments is None else arguments))
    name, debug = "", os.environ.get("HETEROAKD_DEBUG") == "1"
    try:
        for file in files:
            _check_config(Path(file))
        parsed = parser.parse_args(ordered)
        name = parsed.command
        config_class, _ = COMMANDS[name]
        config = build(config_class, parsed[name])
    except ValueError as error:
        if debug:
            raise
        parser.exit(2, f"{f'heteroakd {name}'.strip()}: error: {error}\n")
    flags = {flag: parsed[name][flag] for flag in ("resume", "overwrite", "resume_or_start") if name in TRAINING}
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own networks are named by import path
    try:
        _run(name, config, flags)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if debug:
            raise
        status, text = 1, f"error: {_message(error)}"
    except StoppedError as stopped:
        status, text = 128 + stopped.signal_number, str(stopped)
    except KeyboardInterrupt:
        status, text = 130, "interrupted"
    else:
        return 0
    with reader_may_leave(sys.stderr):
        print(f"heteroakd {name}: {text}", file=sys.stderr, flush=True)
    return status


def gather_lists(arguments: Sequence[str]) -> list[str]:
    """The arguments with what follows an option of LISTS, as a shell spells out *.jpg, made one list of YAML."""
    gathered: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in LISTS:
            values = [value] if equals else []
            while not equals and remaining and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
            is_yaml = values[:1] == ["null"] or (values and values[0].startswith("[") and not os.path.exists(values[0]))
            if len(values) > 1 or (values and not is_yaml):
                values = [json.dumps([LISTS[name](value) for value in values])]
            gathered += [f"--{name}", *values]
        else:
            gathered.append(argument)
    return gathered


def files_first(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with every --config right behind the command, as the parser lets the later one win, so that a file
    would replace the options before it; and the files."""
    files: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--config" and (found := [value] if equals else list(islice(remaining, 1))):
            files += found
        else:  # a --config without a file, too: the parser says so
            others.append(argument)
    return [*others[:1], *(f"--config={file}" for file in files), *others[1:]], files


def _check_config(file: Path) -> None:
    """Raises ValueError for a file that is there and holds no options, where the parser would not say so."""
    try:
        contents = _load_yaml(file.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            got = "nothing" if contents is None else type(contents).__name__
            raise ValueError(f"expected a mapping of options, got {got}")
    except OSError:
        return  # the parser names it
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    except (yaml.YAMLError, ValueError) as error:
        what = "not YAML: " if isinstance(error, yaml.YAMLError) else ""
        raise ValueError(f"--config {file}: {what}{error}") from error


def _message(error: Exception) -> str:
    """The error's own text: what a DataLoader's worker raises comes wrapped in that worker's traceback."""
    text = str(error)
    if text.startswith("Caught ") and "in DataLoader worker process" in text:
        text = text.strip().rpartition(f"{type(error).__name__}: ")[2]
    return text


def _run(name: str, config: Any, flags: dict[str, bool]) -> None:
    """`heteroakd NAME` is the function run_NAME of heteroakd.commands.NAME, or of `train`."""
    place = name.replace("-", "_")
    module = importlib.import_module(f"heteroakd.commands.{'train' if name in TRAINING else place}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    getattr(module, f"run_{place}")(config, **flags)
