"""common/progress.py on a terminal, which a pseudo-terminal is here, and without one."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from common import progress
from common.progress import clock, track
from tests.support.repository import ROOT

BEGIN = "import os, sys, time\nfrom common.progress import Bar, say, track\n"


def on_terminal(body: str, *, columns: int = 80, **variables: str) -> tuple[str, int]:
    """What a program has written to a terminal of so many columns, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(ROOT)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment = {**kept, "TERM": "xterm", **variables}
        os.execve(sys.executable, [sys.executable, "-c", BEGIN + body], environment)
    written = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # nobody holds the other end any more
            break
        if not piece:
            break
        written += piece
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return written.decode(), os.waitstatus_to_exitcode(status)


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: its lines. Only what rich writes is understood."""
    lines, row, column = [""], 0, 0
    for control, argument, text in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|([^\x1b])", written):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
        elif argument == "A":
            row -= int(control or 1)
        elif argument == "K":
            lines[row] = "" if control == "2" else lines[row][:column]
        else:
            assert argument in ("m", "h", "l"), f"{control}{argument} is not understood"
    return [line.rstrip() for line in lines]


def test_a_terminal_gets_a_bar_and_lines_above_it():
    written, code = on_terminal(
        "for n in track(range(40), total=40, label='counting', unit='sheep'):\n"
        "    time.sleep(0.02)\n"
        "    if n % 20 == 0: say(f'[bold]:smile: {n}')\n"
    )
    assert code == 0
    *above, bar, rest = screen(written)
    assert above == ["[bold]:smile: 0", "[bold]:smile: 20"], "what is said is not marked up"
    assert re.fullmatch(r"counting  100 % ━+ 40/40 sheep  \d\d sheep/s", bar)
    assert rest == ""
    assert "━╸" in written or "╺" in written, "it was drawn before the end"
    assert "\x1b[?25l" not in written, "a program that is killed would leave the terminal without a cursor"


def test_bars_stand_one_under_the_other_and_the_outer_stays():
    written, code = on_terminal(
        "outer = Bar(total=10, done=4, unit='steps')\n"
        "outer.tell(label='epoch 0.40', beside='ETA 01:00', below='loss 2.000')\n"
        "for _ in track(range(3), total=3, label='validation', unit='images'): time.sleep(0.3)\n"
        "say('validated')\n"
        "outer.advance()\n"
        "outer.close()\n"
        "say('after')\n"
    )
    assert code == 0
    said, bar, below, after, rest = screen(written)
    assert (said, below, after, rest) == ("validated", "loss 2.000", "after", "")
    assert re.fullmatch(r"epoch 0.40   50 % ━+[╸╺]?━+ 5/10 steps  ETA 01:00", bar)
    assert "validation" in written


@pytest.mark.parametrize("columns", [1, 5, 20])
def test_narrow_terminals(columns):
    body = "bar = Bar(total=10, unit='steps'); bar.tell(label='l' * 50, beside='b' * 50, below='u' * 50); bar.close()"
    written, code = on_terminal(body, columns=columns)
    assert code == 0
    assert all(len(line) <= columns for line in screen(written))


@pytest.mark.seconds
def test_a_terminal_that_goes_ends_nothing(tmp_path):
    """Its writes fail from then on. What was drawn before is drawn no more."""
    body = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "done = 0\n"
        "for n in track(range(8), total=8, label='counting', unit='sheep'):\n"
        "    if n == 3: os.close(2); os.open('/dev/full', os.O_WRONLY)\n"
        "    time.sleep(0.25); done += 1\n"
        f"open({str(tmp_path / 'done')!r}, 'w').write(str(done))\n"
    )
    _, code = on_terminal(body)
    assert (tmp_path / "done").read_text() == "8"
    assert code == 0


def test_without_a_terminal_there_are_lines(capsys, monkeypatch):
    ticks = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))
    assert list(track("abcdef", total=11, label="counting", unit="sheep", weight=2)) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["counting: 6 of 11 sheep, 0 sheep/s", "counting: 11 of 11 sheep, 0 sheep/s"]


def test_a_process_that_was_forked_draws_nothing():
    body = (
        "bar = Bar(total=10, unit='steps')\n"
        "if os.fork() == 0:\n    bar.advance(7); say('from the child'); os._exit(0)\n"
        "os.wait(); bar.close()\n"
    )
    written, code = on_terminal(body)
    assert code == 0
    assert "from the child" in written
    assert "7/10" not in written


@pytest.mark.seconds
def test_drawing_costs_little():
    body = (
        "bar = Bar(total=10**9, unit='steps')\nbar.tell(label='epoch 1.00', beside='ETA 01:00', below='loss 2' * 9)\n"
        "began, cpu = time.perf_counter(), time.process_time()\n"
        "while time.perf_counter() - began < 2: time.sleep(0.001); bar.advance()\n"
        "share = (time.process_time() - cpu) / 2\nbar.close()\nprint(f'share {share:.4f}')\n"
    )
    written, _ = on_terminal(body)
    share = re.search(r"share (\d\.\d+)", written)
    assert share
    assert float(share[1]) < 0.15, "of a core, on any machine, with a thousand wake-ups a second"


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.9, "00:59"), (61, "01:01"), (3600, "1:00:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
    assert time.strftime("%M:%S", time.gmtime(seconds)) in text
