"""One run of a sweep, and its row in the CSV file. A run whose row is there is skipped; of one that fails the row says why."""

import argparse
import hashlib
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from types import FrameType

from common.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from common.files import open_own
from common.flags import FlagParser
from common.lock import BusyError, FolderLock
from common.parent_death import end_with_parent
from common.process import run_program, usable_cores
from common.progress import printable, say
from engine.config import parse_args, to_dict
from perf.machine import card, git_revision
from perf.report import STAGES, read_report
from perf.sweep_table import ERROR, Row, add_row, find_row, read_rows

TRAIN, THROUGHPUT = "train.py", "profile/throughput.py"
EXIT_FAILED = 1
EXIT_BUSY = 3
RATES = tuple(f"{stage}_images_per_second" for stage in reversed(STAGES))
"""Columns of throughput.py's rates; behind each the ends of its interval."""
ENDS = ("_low", "_high", "_p5", "_p95")
"""What follows the column's name for the ends: of a 95 % interval, and of the middle 90 % of laps in earlier sweeps."""

_OF_TRAINING = {
    **{name: name for name in ("best_top1", "top1", "top5", "validation_loss", "images_per_second")},
    **{name: name for name in ("training_seconds", "evaluation_seconds", "checkpoint_seconds", "startup_seconds")},
    **{"steps_done": "steps", "epochs_done": "epochs", "device_used": "device", "precision_used": "precision"},
    **{name: name for name in ("compiled", "resumed")},
}
"""Column → key of train.py's last line."""
_OF_THROUGHPUT = {
    "ceiling_images_per_second": "ceiling.images_per_second",
    "bound": "verdict.bound",
    "mfu": "roofline.mfu",
    "images_per_joule": "roofline.images_per_joule",
    "device_used": "hardware.device",
}
"""Column → where it stands in a report."""
RESULTS = (*_OF_TRAINING, *(f"{rate}{end}" for rate in RATES for end in ("", *ENDS)), *_OF_THROUGHPUT)
RECORDS = (ERROR, "began", "seconds_of_run", "host", "cores", "out")
"""The columns that are neither results nor settings."""
_FIRST = ("program", "variant", "ranks", "card", "git_revision")
"""Columns that stand before the results; the settings follow them."""
_NO_SETTING = ("out", "resume")
"""Flags that say where a run writes, not what it is."""
_SHOWN = ("training_images_per_second", "images_per_second", "best_top1")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of a program with some flags on some ranks."""

    program: str
    """TRAIN or THROUGHPUT."""
    flags: tuple[str, ...]
    ranks: int
    identity: Row
    """Everything that its results depend on: program, settings (defaults and recipe included), ranks, variant, card, revision.
    Two runs with the same identity are one; only the contents of the data set are not in it."""
    out: Path
    """The folder that belongs to this identity."""

    def command(self, python: str) -> list[str]:
        """python: the interpreter to run it with; several ranks have a torchrun of their own, on a port that is free."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        return [python, *(torchrun if self.ranks > 1 else []), self.program, *self.flags, "--out", str(self.out)]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 (there is a row), 1 (the run failed, its row says why), 3 (another process is at this run).

    2, 75 and 130 mean what they mean of train.py.
    """
    return run_program(lambda: _do(argv), interrupted="interrupted; start the same command again")


def _do(argv: list[str] | None) -> int:
    end_with_parent()
    parser = FlagParser(prog="python profile/sweep.py", description="One run of a sweep.", allow_abbrev=False)
    parser.add_argument("--csv", type=Path, required=True, help="file for the row")
    parser.add_argument("--program", choices=(TRAIN, THROUGHPUT), required=True)
    parser.add_argument("--ranks", type=int, default=1, help="more than one run under torchrun (%(default)s)")
    parser.add_argument("--variant", default="", help="a word that tells runs apart whose flags are the same")
    parser.add_argument("--label", default="", help="what is special about this run, for people")
    parser.add_argument("--place", default="1/1", help="number of this run, of how many")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the run")
    parser.add_argument("--dry-run", action="store_true", help="only print the command")
    parser.add_argument("--retry-failed", action="store_true", help="run it again if its row says that it failed")
    parser.add_argument("--wait", action="store_true", help="where another process is at it, until that has ended")
    parser.add_argument("--keep-checkpoints", action="store_true", help="also after the run's end")
    try:
        options, flags = parser.parse_known_args(argv)
        point = describe(options, flags)
        name = f"{options.place}  {printable(options.label)}"
        if options.dry_run:
            note = "  # has a row" if _has_row(options.csv, point, options.retry_failed) else ""
            print(shlex.join(point.command(Path(sys.executable).name)) + note)
            return 0
        point.out.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(point.out.parent, f".{point.out.name}.lock") as lock:
            lock.take(patience_seconds=math.inf if options.wait else 0.0, required=True)
            if _has_row(options.csv, point, options.retry_failed):
                say(f"{name}: has a row")
                return 0
            return _run_and_record(point, options.csv, options.python, name, keep=options.keep_checkpoints)
    except BusyError:
        say(f"{name}: another process is at it")
        return EXIT_BUSY
    except OSError as error:
        place = error.filename or options.csv
        raise UserError(f"{place}: {error.strerror or error}; name another CSV file") from error


def describe(options: argparse.Namespace, flags: Sequence[str]) -> Point:
    """The point that a program's flags mean. Raises UserError: wrong flags."""
    if any(re.fullmatch(r"--(out|resume)(=.*)?", flag) for flag in flags):
        raise UserError("--out, --resume: a sweep gives each run a folder of its own; name the CSV file with CSV=FILE")
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1")
    own = FlagParser(add_help=False, allow_abbrev=False)
    if options.program == THROUGHPUT:
        own.add_argument("--seconds", dest="seconds_a_stage", default="")
    found, others = own.parse_known_args(flags)
    config = parse_args(others)
    settings = {name: _text(value) for name, value in to_dict(config).items() if name not in _NO_SETTING}
    identity = {"program": options.program, "variant": options.variant, "ranks": str(options.ranks)}
    identity |= {"card": card(config.device), "git_revision": git_revision() or "", **vars(found), **settings}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=5).hexdigest()
    name = re.sub(r"[^\w.]+", "-", options.label).strip("-")[:60] or Path(options.program).stem
    out = options.csv.with_suffix("") / f"{name}-{digest}"
    return Point(program=options.program, flags=tuple(flags), ranks=options.ranks, identity=identity, out=out)


def _has_row(path: Path, point: Point, retry_failed: bool) -> bool:
    row = find_row(read_rows(path), point.identity)
    return row is not None and not (retry_failed and row[ERROR])


def _run_and_record(point: Point, path: Path, python: str, name: str, *, keep: bool) -> int:
    output, log = (point.out.with_name(f"{point.out.name}.{kind}") for kind in ("out", "log"))
    began, start = datetime.now().isoformat(timespec="seconds"), monotonic()
    error, stopped = "", 0
    results = results_in(output, point.program)  # of a run that ended just before everything was killed
    if results is None:
        say(f"{name}: {log}")
        error, stopped = _run(point, python, output, log)
        results = results_in(output, point.program)
    if results is None and stopped:
        say(f"{name}: stopped; start the same command again")
        return stopped
    seconds = monotonic() - start
    row = {column: point.identity[column] for column in _FIRST}
    row |= {ERROR: printable(error) if results is None else "", **(results or {}), "began": began}
    row |= {"seconds_of_run": f"{seconds:.1f}", "host": socket.gethostname(), "cores": str(usable_cores())}
    row |= {**point.identity, "out": str(point.out)}
    add_row(path, row, point.identity)
    if results is None:
        say(f"{name}: failed after {seconds:.0f} s: {row[ERROR]}")
        return EXIT_FAILED
    if not keep:
        for checkpoint in point.out.glob("*.pt"):
            checkpoint.unlink()
    figures = [f"{column.replace('_', ' ')} {float(row[column]):.4g}" for column in _SHOWN if row.get(column)]
    say(f"{name}: {', '.join(figures)} ({seconds:.0f} s)")
    return stopped


def _run(point: Point, python: str, output: Path, log: Path) -> tuple[str, int]:
    """Run it to its end, with its stdout and stderr in these files. A signal to this process is handed on, and waited for.

    Returns why it failed, if it did, and the exit code of having been stopped, 0 if no signal came.
    """
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
    with open(log, "rb") as file:
        file.seek(place)
        cause = cause_in(file.read().decode(errors="replace"), status)
    return cause, (EXIT_INTERRUPTED if signals[0] == signal.SIGINT else EXIT_STOPPED) if signals else 0


def results_in(output: Path, program: str) -> Row | None:
    """The results that a run printed into a file; None: there is no such file, it has not ended, or it was stopped.

    Raises UserError: a report that throughput.py names cannot be read.
    """
    try:
        last = json.loads(output.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    if not isinstance(last, dict) or last.get("stopped"):
        return None
    if program == TRAIN:
        return {column: _text(last.get(key)) for column, key in _OF_TRAINING.items()}
    if "report" not in last:
        return None
    report = read_report(Path(last["report"]))
    values = {column: operator.attrgetter(place)(report) for column, place in _OF_THROUGHPUT.items()}
    for column in RATES:
        rate = getattr(report.stages, column.partition("_")[0])
        low, high = (rate and rate.interval) or (None, None)
        values |= {column: rate and rate.images_per_second, f"{column}_low": low, f"{column}_high": high}
    return {column: _text(value) for column, value in values.items()}


def cause_in(log: str, status: int) -> str:
    """Why a run failed, on one line: of what it wrote to stderr, the line that says it.

    That is the last one of the program itself (error: …), else the last exception's that is not torchrun's own, else the last.
    status: its exit code, negative for a signal.
    """
    lines = [said for line in log.splitlines() if (said := re.sub(r"^\[rank\d+\]:\s*", "", line).strip())]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"(?!.*ChildFailedError)[\w.]*(Error|Exception|Interrupt)\b", line)]
    if status < 0 and not told and not raised:
        return f"killed by signal {-status}, as the kernel does where the machine's memory is used up"
    return (told or raised or lines or [f"ended with exit code {status} and said nothing"])[-1]


def _text(value: object) -> str:
    return "" if value is None else str(value)
