"""Every program takes the flags that it has always taken: flags.txt names them, and what a user types goes on working."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

from tests.support.repository import main_elsewhere, programs

LISTED = dict(line.split(": ") for line in Path(__file__).with_name("flags.txt").read_text().splitlines())
"""Command → its flags, with blanks between them."""


def command_of(program: Path) -> str:
    """As a user types it after python."""
    is_module = len(program.parts) > 1 and program.parts[0] != "profile"
    return f"-m {'.'.join(program.with_suffix('').parts)}" if is_module else str(program)


PROGRAMS = {command_of(program): program for program in programs()}


def test_every_program_is_listed():
    assert set(LISTED) == set(PROGRAMS)


def flags_in(text: str) -> list[str]:
    """Those that a --help explains: the rows that begin with one, perhaps within a frame."""
    rows = (line for line in text.splitlines() if re.match("(│ |  )-", line))
    return sorted({flag for row in rows for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", row)})


@pytest.mark.parametrize("command", LISTED)
def test_flags_are_those_that_users_know(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")  # wider, frames stand side by side
    shown, program = io.StringIO(), PROGRAMS[command]
    module = main_elsewhere(program) or ".".join(program.with_suffix("").parts)
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    assert flags_in(shown.getvalue()) == LISTED[command].split()
