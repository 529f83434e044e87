"""What all groups of options have in common: paths are expanded, numbers have bounds, what is not used is refused."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

Default = TypeVar("Default")

PATHS = frozenset({"checkpoint", "continue_from", "image", "images", "output", "root", "runs", "teacher", "weights"})
"""Options that name files or folders."""
SCALES = (1e-3, 16)
"""Bounds of factors on an image's size."""
PROCESSES = 4096
"""More of them, or of threads, no machine has."""
LAST_SEED = 2**63 - 1
"""Every generator takes 63 bits."""


def number(default: Default, least: float = 0, most: float = 10**9, count: int | None = None) -> Default:
    """The field of an option that is a number, or `count` of them (of a tuple as many as it has, of a list some), all
    between two bounds, or None. Beyond 10^9 there are misplaced digits."""
    count = len(default) if isinstance(default, tuple) else count
    bounds = {"bounds": (least, most, count)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=bounds)  # type: ignore[return-value]
    return field(default=default, metadata=bounds)


def check_number(name: str, value: Any, kinds: set[Any], least: float, most: float, count: int | None) -> None:
    """Raises ValueError, naming the option, where one of its numbers is not within its bounds or not whole where its
    `kinds` have no float, where there is none, or where they are not `count`."""
    several = bool({list, tuple} & kinds)
    values = value if isinstance(value, list | tuple) else [value]
    kind = int | float if float in kinds else int
    numbers = all(isinstance(each, kind) and not isinstance(each, bool) and least <= each <= most for each in values)
    if not numbers or several != isinstance(value, list | tuple) or len(values) != (count or len(values) or 1):
        whole = "number" if float in kinds else "whole number"
        wanted = f"{count} {whole}s" if count else f"one or more {whole}s" if several else f"a {whole}"
        raise ValueError(f"{name} must be {wanted} between {least} and {most}, got {value!r}")


def check_name(name: str, value: Any, kinds: set[Any]) -> None:
    """Raises ValueError, naming the option, where it or one of its items is none of the names that its `kinds` hold."""
    for choices in (get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        for each in value if isinstance(value, list | tuple | dict) else [value]:
            if each not in choices and not (each is None and type(None) in kinds):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {each!r}")


def expand_path(path: str) -> str:
    """A path with ~ and environment variables replaced; one that exists as it is written stays.

    Raises ValueError for a variable that is not set.
    """
    if os.path.exists(path):
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    if missing := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise ValueError(f"path {path!r}: the variable {missing[1].strip('{}')} is not set")
    return expanded


@dataclass
class Options:
    """What every group of options does when it is made: paths are expanded.

    Raises ValueError, naming the option, for numbers out of their bounds, paths without a name, and what is none of the
    names that an option may be.
    """

    def __post_init__(self) -> None:
        kinds = {name: _parts(kind) for name, kind in get_type_hints(type(self)).items()}
        for name, of in kinds.items():
            check_name(name, getattr(self, name), of)
        for name in PATHS & self.__dict__.keys():
            value = getattr(self, name)
            paths = value if isinstance(value, list) else [value] if isinstance(value, str) else []
            if not all(path.strip() for path in paths):
                raise ValueError(f"{name} must name a file or a folder, got {value!r}")
            if paths:
                setattr(self, name, [*map(expand_path, paths)] if isinstance(value, list) else expand_path(value))
        for option in fields(self):
            value = getattr(self, option.name)
            if "bounds" in option.metadata and not (value is None and type(None) in kinds[option.name]):
                check_number(option.name, value, kinds[option.name], *option.metadata["bounds"])

    def refuse_twice(self, *names: str) -> None:
        """Raises ValueError where one of the fields, a list, is empty or names something twice."""
        for name in names:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and each once, got {values}")

    def refuse_unused(self, reason: str, *names: str) -> None:
        """Raises ValueError, with the reason, where one of the fields is not as it is by default."""
        for entry in fields(self):
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            if entry.name in names and getattr(self, entry.name) != default:
                raise ValueError(f"{entry.name} is not used {reason}, got {getattr(self, entry.name)}")


def _parts(kind: Any) -> set[Any]:
    """What a type is made of, at every depth: list[int], list, int and None of list[int] | None."""
    return {kind, get_origin(kind)}.union(*map(_parts, get_args(kind)))


Built = TypeVar("Built", bound=Options)


def build(config_class: type[Built], parsed: Namespace, path: str = "") -> Built:
    """The options as parsed, groups within groups. Raises ValueError with the path before the option's name."""
    hints, given = get_type_hints(config_class), {}
    for option in fields(config_class):
        value, kind = parsed[option.name], hints[option.name]
        groups = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, Options)]
        if groups and isinstance(value, Namespace):
            value = build(groups[0], value, f"{path}{option.name}.")
        elif groups and (value is not None or groups[0] is kind):  # a group that may be null is a union
            raise ValueError(f"{path}{option.name} must be a group of options, got {value!r}")
        given[option.name] = value
    try:
        return config_class(**given)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error
