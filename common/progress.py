"""What a person sees while something long runs: a bar on a terminal, a plain line now and then otherwise. All on stderr."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from common.process import visible

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.5  # one takes some two milliseconds

T = TypeVar("T")


def say(message: str) -> None:
    """Print lines for people, on stderr (stdout carries results), above a progress bar if there is one.

    What is not printable in them is escaped: names of files and of classes can hold what a terminal obeys.
    """
    if _screen.live:
        _screen.live.console.print(_lines(message), markup=False, emoji=False, highlight=False, soft_wrap=True)
    else:
        print(_lines(message), file=sys.stderr, flush=True)


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


def clock(seconds: float) -> str:
    """[h:]mm:ss"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class Bar:
    """A bar, and a line under it where there is something to say; without a terminal, nothing. Bars stand one under the other."""

    def __init__(self, *, total: int, unit: str, done: int = 0, label: str = "") -> None:
        self.total, self.unit, self.done = total, unit, done
        self.label, self.beside, self.below = label, "", ""
        _screen.add(self)

    def advance(self, count: int = 1) -> None:
        self.done += count
        _screen.draw()

    def tell(self, *, label: str, beside: str, below: str) -> None:
        """What stands before the bar, behind it and under it."""
        self.label, self.beside, self.below = label, beside, below
        _screen.draw()

    def close(self) -> None:
        """The last one stays on the screen as it is."""
        _screen.remove(self)


class _Screen:
    """The bars of this process. A terminal that is gone is not written to again: what only shows a run never ends it."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.live: Any = None
        self._drawn = 0.0
        os.register_at_fork(after_in_child=self._forget)  # its lines are the parent's, and a lock may have been held

    def add(self, bar: Bar) -> None:
        if not sys.stderr.isatty():
            return
        self.bars.append(bar)
        if not self.live:
            self.live = _new_live(self.bars)
            with self._if_it_is_there():
                self.live.start()
        self.draw(at_once=True)

    def draw(self, *, at_once: bool = False) -> None:
        if not self.live:
            return
        now = time.monotonic()
        if at_once or now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            with self._if_it_is_there():
                self.live.refresh()

    def remove(self, bar: Bar) -> None:
        if bar in self.bars and self.live:
            if len(self.bars) > 1:
                self.bars.remove(bar)
                self.draw(at_once=True)
                return
            live, self.live = self.live, None
            with contextlib.suppress(OSError):
                live.stop()
        self.bars[:] = [other for other in self.bars if other is not bar]

    @contextlib.contextmanager
    def _if_it_is_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._forget()

    def _forget(self) -> None:
        self.live = None
        self.bars.clear()


_screen = _Screen()


def _new_live(bars: list[Bar]) -> Any:
    """What draws the bars whenever it is asked to, in this thread: a thread of its own would die with the terminal."""
    from rich.console import Console, Group, RenderableType  # here: most programs draw nothing
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    class Screen(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # it stays: who is killed could not bring it back

    def drawing() -> Group:
        lines: list[RenderableType] = []
        for bar in bars:
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(no_wrap=True)
            line.add_column(ratio=1)
            line.add_column(no_wrap=True)
            before = f"{bar.label}  {100 * bar.done / max(1, bar.total):3.0f} %".strip()
            behind = f"{bar.done:,}/{bar.total:,} {bar.unit}  {bar.beside}".strip()
            line.add_row(Text(before), ProgressBar(total=max(1, bar.total), completed=bar.done), Text(behind))
            lines.append(line)
            if bar.below:
                lines.append(Text(bar.below, no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    screen = Screen(file=sys.stderr, force_terminal=True)
    return Live(
        console=screen, get_renderable=drawing, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )


def track(
    items: Iterable[T], *, total: int, label: str, unit: str, weight: int | Callable[[T], int] = 1
) -> Iterator[T]:
    """Yield the items and show how far they are. total counts units; each item stands for `weight` of them."""
    units_of = weight if callable(weight) else lambda _: weight
    on_terminal = sys.stderr.isatty()
    began = last = time.monotonic()
    bar = Bar(total=total, unit=unit, label=label)
    try:
        for item in items:
            yield item
            bar.done = min(bar.done + units_of(item), total)
            now = time.monotonic()
            per_second = bar.done / max(now - began, 1e-9)
            if on_terminal:
                left = f"  ETA {clock((total - bar.done) / per_second)}" if 0 < bar.done < total else ""
                bar.tell(label=label, beside=f"{per_second:,.0f} {unit}/s{left}", below="")
            elif now - last >= _SECONDS_BETWEEN_LINES:
                say(f"{label}: {bar.done:,} of {total:,} {unit}, {per_second:,.0f} {unit}/s")
                last = now
    finally:
        bar.close()
