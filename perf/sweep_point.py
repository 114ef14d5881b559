"""One run of a sweep: what makes it the same run as another, its command, and the columns that its results fill."""

import hashlib
import json
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.flags import FlagParser
from common.process import usable_cores
from engine.config import parse_args, to_dict
from perf.machine import card, git_revision
from perf.report_format import find, read_report
from perf.sweep_table import ERROR, Row

TRAIN, THROUGHPUT = "train.py", "profile/throughput.py"
PROGRAMS = (TRAIN, THROUGHPUT)

_FIRST = ("program", "variant", "ranks", "card", "git_revision")
"""Columns that stand before the results; the settings follow them."""
_NO_SETTING = ("out", "resume")
"""Flags that say where a run writes, not what it is."""
_OF_TRAINING = {
    **dict.fromkeys(("best_top1", "top1", "top5", "validation_loss", "images_per_second")),
    **dict.fromkeys(("training_seconds", "evaluation_seconds", "checkpoint_seconds", "startup_seconds")),
    **{"steps": "steps_done", "epochs": "epochs_done", "device": "device_used", "precision": "precision_used"},
    **dict.fromkeys(("compiled", "resumed")),
}
"""Key of train.py's last line → column, where it has another name."""
STAGES = ("training", "step", "loader", "decoding", "reading")
_OF_THROUGHPUT = {
    **{f"stages.{stage}.images_per_second.median": f"{stage}_images_per_second" for stage in STAGES},
    **{
        f"stages.{stage}.images_per_second.{end}": f"{stage}_images_per_second_{end}"
        for stage in STAGES
        for end in ("p5", "p95")
    },
    "ceiling.images_per_second": "ceiling_images_per_second",
    "verdict.bound": "bound",
    "roofline.mfu": "mfu",
    "roofline.images_per_joule": "images_per_joule",
    "hardware.device": "device_used",
}
"""Path in throughput.py's report → column."""
RESULTS = (*(column or key for key, column in _OF_TRAINING.items()), *_OF_THROUGHPUT.values())
RECORDS = (ERROR, "began", "seconds_of_run", "host", "cores", "out")
"""The columns that are neither results nor settings."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of a program with some flags on some ranks."""

    program: str
    """One of PROGRAMS."""
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


def describe(program: str, flags: Sequence[str], *, ranks: int, variant: str, label: str, folder: Path) -> Point:
    """The point that a program's flags mean. Raises UserError: wrong flags.

    variant: tells runs apart that differ in nothing else, as those of strong and of weak scaling on one rank; may be empty.
    label: readable, for the name of the folder in `folder`.
    """
    if any(re.fullmatch(r"--(out|resume)(=.*)?", flag) for flag in flags):
        raise UserError("--out, --resume: a sweep gives each run a folder of its own; name the CSV file with CSV=FILE")
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be at least 1")
    own = FlagParser(add_help=False, allow_abbrev=False)
    if program == THROUGHPUT:
        own.add_argument("--seconds", dest="seconds_a_stage", default="")
    options, others = own.parse_known_args(flags)
    config = parse_args(others)
    settings = {name: _text(value) for name, value in to_dict(config).items() if name not in _NO_SETTING}
    identity = {
        "program": program,
        "variant": variant,
        "ranks": str(ranks),
        "card": card(config.device),
        "git_revision": git_revision() or "",
        **vars(options),
        **settings,
    }
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=5).hexdigest()
    name = re.sub(r"[^\w.]+", "-", label).strip("-")[:60]
    out = folder / f"{name or Path(program).stem}-{digest}"
    return Point(program=program, flags=tuple(flags), ranks=ranks, identity=identity, out=out)


def row_of(point: Point, *, began: str, seconds: float, results: Row, error: str) -> Row:
    """began: date and time; seconds: of the whole run; error: empty where there are results."""
    return {
        **{name: point.identity[name] for name in _FIRST},
        ERROR: error,
        **results,
        "began": began,
        "seconds_of_run": f"{seconds:.1f}",
        "host": socket.gethostname(),
        "cores": str(usable_cores()),
        **point.identity,
        "out": str(point.out),
    }


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
        return {column or key: _text(last.get(key)) for key, column in _OF_TRAINING.items()}
    if "report" not in last:
        return None
    report = read_report(Path(last["report"]))
    return {column: _text(find(report, path)) for path, column in _OF_THROUGHPUT.items()}


def cause_in(log: str, status: int) -> str:
    """Why a run failed, on one line: of what it wrote to stderr, the line that says it.

    That is the last one of the program itself (error: …), else the last exception's that is not torchrun's own, else the last.
    status: its exit code, negative for a signal.
    """
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in log.splitlines()]
    lines = [line for line in lines if line]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    raised = [line for line in raised if "ChildFailedError" not in line]
    if status < 0 and not told and not raised:
        return f"killed by signal {-status}, as the kernel does where the machine's memory is used up"
    return (told or raised or lines or [f"ended with exit code {status} and said nothing"])[-1]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def shown_command(point: Point) -> list[str]:
    """The command as a person would type it."""
    return point.command(Path(sys.executable).name)
