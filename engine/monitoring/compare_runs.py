"""python -m engine.compare_runs RUN RUN… [--out comparison.png]: a table of several runs and their curves in one picture.

RUN is an --out of train.py, finished or not. The table has the flags in which the runs differ, and their figures.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.flags import FlagParser
from common.process import run_program
from common.progress import printable, show
from engine.monitoring.curves import draw_runs
from engine.monitoring.run_files import Run, read_run

# Flags that change neither what a run computes nor how fast.
_LEFT_OUT = {
    "out", "resume", "inspect", "wandb", "log_every", "checkpoint_minutes", "keep", "max_bad_images", "allow_changed_data",
}  # fmt: skip
_FIGURES = {
    "epoch": ("epoch", ".2f"),
    "train_loss": ("train loss", ".3f"),
    "validation_loss": ("val loss", ".3f"),
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
    "best_top1": ("best top-1 %", ".2f"),
    "images_per_second": ("images/s", ",.0f"),
    "data_wait": ("data wait %", ".0f"),
}
_FLAGS_IN_LEGEND = 4
_PERCENT = {"top1", "top5", "best_top1", "data_wait"}


def figures_of(run: Run) -> dict[str, float | None]:
    """A run's last figures and, by median, its speed; None for what it has not got yet, or is not finite. Shares are 0–1."""
    last = run.training[-1] if run.training else {}
    tested = run.validation[-1] if run.validation else {}

    def median(name: str) -> float | None:
        values = [record[name] for record in run.training if math.isfinite(record[name])]
        return statistics.median(values) if values else None

    figures = {
        "epoch": max((record["epoch"] for record in (last, tested) if record), default=None),
        "train_loss": last.get("loss"),
        "validation_loss": tested.get("loss"),
        "top1": tested.get("top1"),
        "top5": tested.get("top5"),
        "best_top1": max((record["top1"] for record in run.validation if math.isfinite(record["top1"])), default=None),
        "images_per_second": median("images_per_second"),
        "data_wait": median("data_wait"),
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def differing_flags(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """The flags that are not the same in all of the configurations, in the order of train.py's."""
    flags = dict.fromkeys(flag for config in configs for flag in config if flag not in _LEFT_OUT)
    return [flag for flag in flags if len({str(config.get(flag)) for config in configs}) > 1]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders without the parents that all of them share."""
    parts = [folder.absolute().parts for folder in folders]
    shared = 0
    while all(len(own) > shared + 1 and own[: shared + 1] == parts[0][: shared + 1] for own in parts):
        shared += 1
    return ["/".join(own[shared:]) for own in parts]


def table(names: Sequence[str], runs: Sequence[Run]) -> str:
    """A line for each run: its name, the flags that differ, its figures."""
    flags = differing_flags([run.config for run in runs])
    rows = [["run", *flags, *(title for title, _ in _FIGURES.values())]]
    for name, run in zip(names, runs, strict=True):
        values = figures_of(run)
        cells = [_said(run.config.get(flag)) for flag in flags]
        for figure, (_, form) in _FIGURES.items():
            value = values[figure]
            cells.append("–" if value is None else format(100 * value if figure in _PERCENT else value, form))
        rows.append([printable(cell) for cell in (name, *cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(w) if i <= len(flags) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _said(value: object) -> str:
    return "–" if value is None else str(value)


def compare(folders: Sequence[Path], out: Path) -> dict:
    """Print the table, draw the picture, return both's contents. Raises UserError."""
    runs = [read_run(folder) for folder in folders]
    names = short_names(folders)
    flags = differing_flags([run.config for run in runs])
    show(table(names, runs))
    legend = [
        "  ".join([name, *(f"{flag} {_said(run.config.get(flag))}" for flag in flags[:_FLAGS_IN_LEGEND])])
        for name, run in zip(names, runs, strict=True)
    ]
    try:
        draw_runs(runs, legend, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another file") from error
    entries = [
        {"run": str(run.folder), "flags": {flag: run.config.get(flag) for flag in flags}, **figures_of(run)}
        for run in runs
    ]
    return {"picture": str(out), "runs": entries}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError."""
    parser = FlagParser(prog="python -m engine.compare_runs", description="Compare runs of train.py.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (--out of train.py)")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.png"), help="picture to write (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        options = parse_args(argv)
        print(json.dumps(compare(options.runs, options.out)))
        return 0

    return run_program(work)
