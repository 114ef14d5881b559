"""python profile/sweep.py --csv FILE --program train.py [--ranks N] FLAGS: one run of a sweep, and its row in the CSV file.

The scripts in sweeps/ call this once for each point of their grid. A run whose row is there is skipped; one that fails has
a row that says why. FLAGS are the program's own, --out apart: each run has a folder of its own beside the CSV file.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from types import FrameType

from common.errors import EXIT_STOPPED, UserError
from common.files import open_own
from common.flags import FlagParser
from common.orphans import end_with_parent
from common.process import run_program
from common.progress import printable, say
from perf.sweep_point import PROGRAMS, THROUGHPUT, Point, cause_in, describe, results_in, row_of, shown_command
from perf.sweep_table import ERROR, Row, add_row, find_row, locked, read_rows

EXIT_FAILED = 1
EXIT_BUSY = 3
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_SHOWN = ("training_images_per_second", "images_per_second", "best_top1")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended."""

    results: Row | None
    """None: it failed, or was stopped."""
    error: str
    stopped_by: int | None
    """The signal that this program was sent meanwhile."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 (there is a row), 1 (the run failed, its row says why), 3 (another process is at this run).

    2, 75 and 130 mean what they mean of train.py.
    """
    return run_program(lambda: _do(argv), interrupted="interrupted; start the same command again")


def _do(argv: list[str] | None) -> int:
    end_with_parent()
    parser = FlagParser(prog="python profile/sweep.py", description="One run of a sweep.", allow_abbrev=False)
    parser.add_argument("--csv", type=Path, required=True, help="file for the row")
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--ranks", type=int, default=1, help="more than one run under torchrun (%(default)s)")
    parser.add_argument("--variant", default="", help="a word that tells runs apart whose flags are the same")
    parser.add_argument("--label", default="", help="what is special about this run, for people")
    parser.add_argument("--place", default="1/1", help="number of this run, of how many")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the run")
    parser.add_argument("--dry-run", action="store_true", help="only print the command")
    parser.add_argument("--retry-failed", action="store_true", help="run it again if its row says that it failed")
    parser.add_argument(
        "--wait", action="store_true", help="where another process is at this run, until that has ended"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="also after the run's end")
    try:
        options, flags = parser.parse_known_args(argv)
        point = describe(
            options.program,
            flags,
            ranks=options.ranks,
            variant=options.variant,
            label=options.label,
            folder=options.csv.with_suffix(""),
        )
        name = f"{options.place}  {printable(options.label)}"
        if options.dry_run:
            note = "  # has a row" if _has_row(options.csv, point, options.retry_failed) else ""
            print(shlex.join(shown_command(point)) + note)
            return 0
        with locked(point.out.with_name(f".{point.out.name}.lock"), wait=options.wait) as is_ours:
            if not is_ours:
                say(f"{name}: another process is at it")
                return EXIT_BUSY
            if _has_row(options.csv, point, options.retry_failed):
                say(f"{name}: has a row")
                return 0
            return _run_and_record(point, options.csv, options.python, name, keep=options.keep_checkpoints)
    except OSError as error:
        place = error.filename or options.csv
        raise UserError(f"{place}: {error.strerror or error}; name another CSV file") from error


def _has_row(path: Path, point: Point, retry_failed: bool) -> bool:
    row = find_row(read_rows(path), point.identity)
    return row is not None and not (retry_failed and row[ERROR])


def _run_and_record(point: Point, path: Path, python: str, name: str, *, keep: bool) -> int:
    output, log = (point.out.with_name(f"{point.out.name}.{kind}") for kind in ("out", "log"))
    began, start = datetime.now().isoformat(timespec="seconds"), monotonic()
    results = results_in(output, point.program)  # of a run that ended just before everything was killed
    if results is not None:
        ended = Ended(results=results, error="", stopped_by=None)
    else:
        say(f"{name}: {log}")
        ended = _run(point, python, output, log)
    stopped = ended.stopped_by and (_INTERRUPTED if ended.stopped_by == signal.SIGINT else EXIT_STOPPED)
    if stopped and ended.results is None:
        say(f"{name}: stopped; start the same command again")
        return stopped
    seconds = monotonic() - start
    row = row_of(point, began=began, seconds=seconds, results=ended.results or {}, error=printable(ended.error))
    add_row(path, row, point.identity)
    if ended.error:
        say(f"{name}: failed after {seconds:.0f} s: {printable(ended.error)}")
        return EXIT_FAILED
    if not keep:
        for checkpoint in point.out.glob("*.pt"):
            checkpoint.unlink()
    figures = [f"{column.replace('_', ' ')} {float(row[column]):.4g}" for column in _SHOWN if row.get(column)]
    say(f"{name}: {', '.join(figures)} ({seconds:.0f} s)")
    return stopped or 0


def _run(point: Point, python: str, output: Path, log: Path) -> Ended:
    """Run it to its end, with its stdout and stderr in these files. A signal to this process is handed on, and waited for."""
    if point.program == THROUGHPUT:
        # Of a run that was killed: it refuses a folder that holds a report.
        shutil.rmtree(point.out, ignore_errors=True)
    signals: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        child.send_signal(signal.SIGTERM)  # which torchrun hands on to its ranks; train.py saves and leaves

    with (
        os.fdopen(open_own(output, os.O_WRONLY | os.O_TRUNC), "wb") as stdout,
        os.fdopen(open_own(log, os.O_WRONLY | os.O_APPEND), "ab") as stderr,
    ):
        place = stderr.tell()
        # In a session of its own, where Ctrl-C does not reach it: what is asked of this process, it is asked in its turn.
        try:
            child = subprocess.Popen(
                point.command(python), stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=end_with_parent
            )
        except OSError as error:
            raise UserError(f"--python {python}: cannot be run ({error.strerror}); name another interpreter") from error
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, hand_on)
        status = child.wait()
    stopped_by = signals[0] if signals else None
    results = results_in(output, point.program)
    if results is not None:
        return Ended(results=results, error="", stopped_by=stopped_by)
    with open(log, "rb") as file:
        file.seek(place)
        text = file.read().decode(errors="replace")
    return Ended(results=None, error=cause_in(text, status), stopped_by=stopped_by)
