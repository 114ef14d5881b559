"""Every program takes the flags that it has always taken: flags.txt names them, and what a user types goes on working."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

LISTED = dict(line.split(": ") for line in Path(__file__).with_name("flags.txt").read_text().splitlines())
"""Command → its flags, with blanks between them."""


def module_of(command: str) -> str:
    """The module with the command's main: of python -m NAME, of NAME.py, of profile/NAME.py."""
    if command.startswith("-m "):
        return command.removeprefix("-m ")
    name = Path(command).stem
    source = Path(__file__).parents[2].joinpath(command).read_text()
    found = re.search(r"^ *from ([\w.]+) import main$", source, re.M)
    return found[1] if found else name


def flags_in(text: str) -> list[str]:
    """Those that a --help explains: the rows that begin with one, perhaps within a frame."""
    rows = (line for line in text.splitlines() if re.match("(│ |  )-", line))
    return sorted({flag for row in rows for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", row)})


@pytest.mark.parametrize("command", LISTED)
def test_flags_are_those_that_users_know(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")  # wider, frames stand side by side
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(module_of(command)).main(["--help"])
    assert flags_in(shown.getvalue()) == LISTED[command].split()
