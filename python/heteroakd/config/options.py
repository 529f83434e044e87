"""What all groups of options have in common: paths are expanded, numbers have bounds, what is not used is refused."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

Default = TypeVar("Default")

PATHS = frozenset({"checkpoint", "continue_from", "image", "images", "output", "root", "runs", "teacher", "weights"})
"""Options that name files or folders."""
LARGEST = sys.float_info.max
"""The bound of what is finite, and no more."""
LAST_SEED = 2**63 - 1
"""The largest that torch takes."""


def number(default: Default, least: float = 0, most: float = LARGEST) -> Default:
    """The field of an option that is a number, or some in a list or tuple, all of them between two bounds, or None."""
    bounds = {"bounds": (least, most)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=bounds)  # type: ignore[return-value]
    return field(default=default, metadata=bounds)


def check_number(name: str, value: Any, default: Any, least: float, most: float) -> None:
    """Raises ValueError, naming the option, where one of its numbers is not within its bounds, where there is none, or
    where they are not as many as the default, a tuple, has."""
    several = isinstance(value, list | tuple)
    values = value if several else [value]
    count = len(default) if isinstance(default, tuple) else len(values) or 1
    if len(values) != count or not all(least <= each <= most for each in values):
        numbers = f"{count} numbers" if isinstance(default, tuple) else "one or more numbers" if several else "a number"
        bounds = f"between {least} and {most}" if most < LARGEST else f"of at least {least}"
        raise ValueError(f"{name} must be {numbers} {bounds}, got {value}")


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

    Raises ValueError, naming the option, for numbers out of their bounds and paths without a name.
    """

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        """`prefix` stands before the options' names where they are given."""
        cls.prefix = prefix

    def __post_init__(self) -> None:
        for name in PATHS & self.__dict__.keys():
            value = getattr(self, name)
            if isinstance(value, str):
                if not value.strip():
                    raise ValueError(f"{self.prefix}{name} must name a file or a folder, got {value!r}")
                setattr(self, name, expand_path(value))
            elif isinstance(value, list):
                setattr(self, name, [*map(expand_path, value)])
        for option in fields(self):
            value = getattr(self, option.name)
            if "bounds" in option.metadata and value is not None:
                check_number(self.prefix + option.name, value, option.default, *option.metadata["bounds"])

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
                raise ValueError(f"{self.prefix}{entry.name} is not used {reason}, got {getattr(self, entry.name)}")
