"""Flags of the programs: parsed with argparse, or with tyro into a dataclass whose field docstrings are the help."""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

from common.errors import UserError

T = TypeVar("T")


class FlagParser(argparse.ArgumentParser):
    """Raises UserError with one sentence for a wrong flag, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def whole_above_zero(text: str) -> int:
    """A flag's type."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def above_zero(text: str) -> float:
    """A flag's type: a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def parse_dataclass(cls: type[T], flags: Sequence[str], default: T | None, prog: str) -> T:
    """Flags as an instance of a dataclass. Raises UserError with one sentence for a wrong flag; --help prints and exits.

    cls: --help shows its own flags and those of each dataclass that it is put together from in groups.
    default: the values of flags that are not given; None where those that have no default in the class must be.
    prog: the program's name, as a user types it.
    """
    import tyro  # here: the programs that use argparse do without it

    groups = [group for group in (cls, *cls.__bases__) if vars(group).get("__annotations__")]
    names = [group.__name__.removesuffix("Flags").lower() for group in groups]
    forms: list[Any] = [_form(group, default) for group in groups]
    form = forms[0] if len(forms) == 1 else dataclasses.make_dataclass(cls.__name__, zip(names, forms, strict=True))
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            given = tyro.cli(
                form,
                args=flags,
                prog=prog,
                description=_joined(cls.__doc__),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise UserError(f"{_first_paragraph(messages.getvalue())}; {prog} --help lists the flags") from None
    parts = [given] if len(forms) == 1 else vars(given).values()
    return cls(**{name: value for part in parts for name, value in vars(part).items()})


def _form(cls: type, default: object) -> type:
    """A dataclass with the fields that `cls` declares, the values of `default`, and help texts that fit any terminal's width.

    Left to find the texts itself, tyro keeps the line breaks of the source.
    """
    import tyro

    texts = _help_texts(cls)
    kinds = get_type_hints(cls, include_extras=True)
    annotated: Any = Annotated
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        if field.name not in vars(cls)["__annotations__"]:
            continue  # a base's
        kind: Any = annotated[kinds[field.name], tyro.conf.arg(help=_joined(texts[field.name]))]
        own = dataclasses.field(default=field.default, default_factory=field.default_factory)
        fields.append(
            (field.name, kind, own if default is None else dataclasses.field(default=getattr(default, field.name)))
        )
    made = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    made.__doc__ = _joined(cls.__doc__)
    return made


@functools.cache  # reading a module's source for each of its classes takes longer than all the rest
def _help_texts(cls: type) -> dict[str, str]:
    """The docstring of each field, by the field's name."""
    import docstring_parser

    return {text.arg_name: text.description or "" for text in docstring_parser.parse_from_object(cls).params}


def _joined(text: str | None) -> str:
    """The text with its paragraphs on one line each."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


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
