#!/usr/bin/env python3
"""A launcher of the C++ compiler that compiles nothing twice, for the set-up and the tests of installation after it.

CMake calls it with the compiler's command, as the variable CMAKE_CXX_COMPILER_LAUNCHER says. An object is kept by what
it is made of (the preprocessed source, the options but for files and folders, the compiler) in the environment that
runs this, if it is a virtual one: sources in another folder, or beside another torch whose headers they do not see,
find theirs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

WITH_PATH = ("-o", "-MF", "-MT", "-I", "-isystem")  # options whose argument is a file or a folder
OF_FOLDERS = ("-I", "-isystem", "-fmacro-prefix-map=")  # and those that begin so and name one


def parts(command: list[str]) -> tuple[list[str], str, str]:
    """The options of a command that decide what is compiled, the source and the object ("" for none)."""
    options, source, target, left = [], "", "", iter(command[1:])
    for word in left:
        if word in WITH_PATH:
            value = next(left)
            target = value if word == "-o" else target
        elif word == "-c":
            source = next(left)
        elif not word.startswith(OF_FOLDERS):
            options.append(word)
    return options, source, target


def digest(command: list[str]) -> str | None:
    """Of what an object is made of; None where the command compiles none, or does not get so far."""
    options, source, target = parts(command)
    if not source or not target:
        return None
    at = command.index("-o")
    words = [word for word in (*command[:at], *command[at + 2 :]) if word != "-c"]
    # -P: without the lines that name files. The list of headers (-MD) is written on the way.
    preprocessed = subprocess.run([*words, "-E", "-P"], capture_output=True, check=False)
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False)
    if preprocessed.returncode or version.returncode:
        return None
    return hashlib.sha256(repr((options, version.stdout)).encode() + preprocessed.stdout).hexdigest()


def main(command: list[str], folder: Path) -> int:
    """Compiles, or copies what ``folder`` has kept; the compiler's exit status."""
    name = digest(command)
    if name is None:
        return subprocess.run(command, check=False).returncode
    target, kept = Path(parts(command)[2]), folder / f"{name}.o"
    if kept.exists():
        shutil.copyfile(kept, target)
        return 0
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        shutil.copyfile(target, part)
        part.rename(kept)  # whole or not at all, whoever else keeps the same
    return status


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
    sys.exit(main(sys.argv[1:], Path(sys.prefix, "objects")))
