"""What the tests' launcher of the compiler keeps, and what it compiles again."""

import os
from pathlib import Path

import kept_objects
import pytest

TEXT = '#include "number.h"\nint two() { return NUMBER + number(); }\n'


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Compiles ``text`` in a ``folder`` as CMake does: the exit status, and whether the compiler was asked to."""
    compiler, asked = tmp_path / "c++", tmp_path / "asked"
    real = os.environ.get("CXX", "g++")
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) echo >> {asked};; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)

    def run(folder: str, text: str = TEXT, *options: str, number: int = 1) -> tuple[int, bool]:
        asked.unlink(missing_ok=True)
        home = tmp_path / folder
        home.mkdir(exist_ok=True)
        (home / "number.h").write_text(f"inline int number() {{ return {number}; }}\n")
        (home / "a.cpp").write_text(text)
        names = ("-MD", "-MT", "a.o", "-MF", "a.o.d", "-o", "a.o", "-c", str(home / "a.cpp"))
        monkeypatch.chdir(home)
        status = kept_objects.main([str(compiler), "-DNUMBER=1", "-I", str(home), *options, *names], tmp_path / "kept")
        return status, asked.exists()

    return run


def test_the_same_in_another_folder_is_copied(build, tmp_path):
    assert build("one") == (0, True)
    assert build("two") == (0, False)
    assert (tmp_path / "one" / "a.o").read_bytes() == (tmp_path / "two" / "a.o").read_bytes()
    assert "two/number.h" in Path("a.o.d").read_text()  # the next build knows what it depends on


def test_what_names_its_own_file_is_copied_where_the_folder_is_left_out(build, tmp_path):
    text = TEXT + "const char* file() { return __FILE__; }\n"
    assert build("one", text, f"-fmacro-prefix-map={tmp_path / 'one'}/=") == (0, True)
    assert build("two", text, f"-fmacro-prefix-map={tmp_path / 'two'}/=") == (0, False)
    assert build("three", text) == (0, True)


def test_what_differs_is_compiled(build, tmp_path):
    assert build("one") == (0, True)
    assert build("macro", TEXT, "-UNUMBER", "-DNUMBER=2") == (0, True)
    assert build("option", TEXT, "-O2") == (0, True)
    assert build("source", TEXT.replace("+", "-")) == (0, True)
    assert build("header", number=2) == (0, True)
    compiler = tmp_path / "c++"
    compiler.write_text(compiler.read_text().replace("exec", '[ "$1" = --version ] && exec echo another\nexec'))
    assert build("compiler") == (0, True)


@pytest.mark.parametrize("text", ["#error planted\n", "int two() { return }\n"], ids=["preprocessor", "compiler"])
def test_a_mistake_is_the_compilers_to_say(build, text, capfd):
    for _ in range(2):
        status, asked = build("one", text)
        assert status != 0 and asked and "error" in capfd.readouterr().err
