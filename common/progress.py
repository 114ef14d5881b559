"""What a person sees while something long runs: a bar on a terminal, a plain line now and then otherwise. All on stderr."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from common.process import visible

_SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def say(message: str) -> None:
    """Print lines for people, on stderr (stdout carries results), above a progress bar if there is one.

    What is not printable in them is escaped: names of files and of classes can hold what a terminal obeys.
    """
    tqdm.write(_lines(message), file=sys.stderr)
    sys.stderr.flush()


@functools.cache
def say_once(message: str) -> None:
    """The same, but only the first time that this process says it."""
    say(message)


def show(text: str = "") -> None:
    """Print lines for people, on stdout, before the line of JSON; what is not printable in them is escaped."""
    print(_lines(text))


def _lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def printable(text: str) -> str:
    """The same text on one line, in characters that any terminal and file takes, so that no other text becomes the same."""
    return visible(text.replace("\\", "\\\\"))


def track(
    items: Iterable[T], *, total: int, label: str, unit: str, weight: int | Callable[[T], int] = 1
) -> Iterator[T]:
    """Yield the items and show how far they are. total counts units; each item stands for `weight` of them."""
    units_of = weight if callable(weight) else lambda _: weight
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr) as bar:
            for item in items:
                yield item
                bar.update(min(units_of(item), total - bar.n))
        return
    started = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done = min(done + units_of(item), total)
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            say(f"{label}: {done:,} of {total:,} {unit}, {done / (now - started):,.0f} {unit}/s")
            last = now
