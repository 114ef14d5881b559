"""What this project claims of itself: `python -m benchmarks.NAME` measures it. Its last line on stdout is the figures as JSON."""

import sys

if sys.argv[0] == "-m":  # as it is until NAME has been found: Ctrl-C ends the imports in a line, too
    from common.start import begin

    begin()

import json
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from common.errors import UserError
from common.flags import FlagParser
from common.process import run_program
from engine.config import Config, parse_args


def flag_parser(name: str, purpose: str) -> FlagParser:
    """Of benchmarks.NAME; what it does not know may be a flag of train.py."""
    return FlagParser(prog=f"python -m benchmarks.{name}", description=purpose, allow_abbrev=False)


def train_config(flags: Sequence[str], *, defaults: Sequence[str] = (), chosen: Sequence[str]) -> Config:
    """train.py's configuration from `flags`, with other defaults. Raises UserError: a flag is one that is `chosen` already.

    chosen: what the benchmark is about, each as "--flag=value".
    """
    ours, all_flags = parse_args([*defaults, *chosen]), parse_args([*defaults, *chosen, *flags])
    for flag in chosen:
        name = flag.partition("=")[0].removeprefix("--").removeprefix("no-")
        field = name.replace("-", "_")
        if getattr(ours, field) != getattr(all_flags, field):
            raise UserError(f"--{name}: the benchmark chooses it; leave it out")
    return all_flags


def program(run: Callable[[list[str] | None], dict]) -> Callable[..., int]:
    """Make main(argv=None), which returns the exit code, of a function that parses the flags and returns the figures."""

    def main(argv: list[str] | None = None) -> int:
        def print_figures() -> int:
            before = signal.signal(signal.SIGTERM, _leave)
            try:
                print(json.dumps(run(argv)))
            finally:
                signal.signal(signal.SIGTERM, before)
            return 0

        return run_program(print_figures)

    return main


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Not at once: network namespaces and copies of data sets are to be removed."""
    raise SystemExit(128 + number)
