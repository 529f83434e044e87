"""Fonts that have the letters of what is to be written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from PIL import ImageFont

from heteroakd.system.distributed import say

DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
"""Latin, Greek, Cyrillic and more, with every matplotlib."""


@cache
def font_for(letters: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or a font of the system that has what it lacks, in a size in pixels."""
    return ImageFont.truetype(_file_for(frozenset(letters)), size)


@cache
def families_for(letters: str) -> list[str]:
    """The same as matplotlib names fonts: what the first lacks is taken from the next."""
    file = _file_for(frozenset(letters))
    own = [] if file == DEJAVU else [font.name for font in font_manager.fontManager.ttflist if font.fname == file]
    return ["DejaVu Sans", *own[:1]]


@cache
def _file_for(letters: frozenset[str]) -> str:
    """Of DejaVu Sans and the system's fonts, regular ones before others, the first that has all letters; DejaVu Sans,
    and a warning, where none has."""
    needed = {ord(letter) for letter in letters if letter.isprintable()}
    if _has(DEJAVU, needed):
        return DEJAVU
    fonts = font_manager.fontManager.ttflist
    for font in sorted(fonts, key=lambda font: (str(font.weight) != "400", font.style != "normal")):
        if _has(font.fname, needed):
            return str(font.fname)
    lacking = "".join(sorted(letter for letter in letters if not _has(DEJAVU, {ord(letter)})))
    _warn(f"no font here has {lacking!r}: boxes stand in pictures for letters; install one, Noto Sans CJK for example")
    return DEJAVU


def _has(file: str, letters: set[int]) -> bool:
    try:
        return letters <= font_manager.get_font(file).get_charmap().keys()
    except (OSError, RuntimeError):  # a font that is gone, or no font
        return False


@cache
def _warn(text: str) -> None:
    """Say it once."""
    say(f"warning: {text}")
