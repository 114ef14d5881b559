"""Flags of the programs: parsed with argparse, or with tyro into a dataclass whose field docstrings are the help."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from common.errors import UserError

T = TypeVar("T")


class FlagParser(argparse.ArgumentParser):
    """Raises UserError with one sentence for a wrong flag, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def parse_dataclass(cls: type[T], flags: Sequence[str], default: T | None, prog: str) -> T:
    """Flags as an instance of a dataclass. Raises UserError with one sentence for a wrong flag; --help prints and exits.

    default: the values of flags that are not given; None where those that have no default in the class must be.
    prog: the program's name, as a user types it.
    """
    import tyro  # here: the programs that use argparse do without it

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            if default is None:
                return tyro.cli(cls, args=flags, prog=prog)
            return tyro.cli(cls, args=flags, default=default, prog=prog)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise UserError(f"{_first_paragraph(messages.getvalue())}; {prog} --help lists the flags") from None


def expand_switch(flags: Sequence[str], name: str) -> list[str]:
    """--NAME and --no-NAME as --NAME on and --NAME off, for a flag whose values are auto, on and off."""
    expanded = []
    for position, token in enumerate(flags):
        if token in (f"--no-{name}", f"--no_{name}"):
            expanded += [f"--{name}", "off"]
        elif token == f"--{name}" and ([*flags[position + 1 : position + 2], "--"])[0].startswith("--"):
            expanded += [f"--{name}", "on"]
        else:
            expanded.append(token)
    return expanded


def _first_paragraph(box: str) -> str:
    """What stands first inside the frame that tyro draws round an error, without the full stop."""
    words: list[str] = []
    for line in box.splitlines():
        line = line.strip().strip("│").strip()
        if not line or line[0] in "╭╰":
            continue
        if line[0] == "─":
            break
        words += line.split()
    return " ".join(words).rstrip(".")
