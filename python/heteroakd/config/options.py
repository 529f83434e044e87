"""What all groups of options have in common: paths are expanded, and what is not used is refused."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, dataclass, fields

PATHS = frozenset({"checkpoint", "continue_from", "image", "images", "output", "root", "runs", "teacher", "weights"})
"""Options that name files or folders."""


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
    """What every group of options does when it is made: paths are expanded."""

    def __post_init__(self) -> None:
        for name in PATHS & self.__dict__.keys():
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, expand_path(value))
            elif isinstance(value, list):
                setattr(self, name, [*map(expand_path, value)])

    def refuse_unused(self, reason: str, *names: str) -> None:
        """Raises ValueError, with the reason, where one of the fields is not as it is by default."""
        for entry in fields(self):
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            if entry.name in names and getattr(self, entry.name) != default:
                raise ValueError(f"{entry.name} is not used {reason}, got {getattr(self, entry.name)}")
