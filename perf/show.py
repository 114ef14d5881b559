"""python profile/report.py REPORT.json [--out DIR]: the table, report.html and the pictures of a measured run.

python profile/report.py A.json B.json: two runs against each other, a table and comparison.png. Both read the report.json that
profile/throughput.py writes, and write into its folder (B's) unless --out names another.

python profile/report.py SWEEP.csv: the table and the plots of a sweep, by the columns that vary in it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from common.errors import UserError
from common.files import replacing, writing_to
from common.flags import FlagParser
from common.process import run_program
from common.progress import printable
from perf import pictures, words
from perf.compare import compare, comparison, comparison_tables, differences
from perf.device_pictures import roofline, telemetry
from perf.page import cost_table, page
from perf.plot_style import png
from perf.report import Report, read_report
from perf.sweep_plot import by_program, plot_sweep, sweep_table, varying
from perf.sweep_table import ERROR, read_rows

PAGE = "report.html"
PICTURES: dict[str, Callable[[Report], Figure | str]] = {
    "steps": pictures.steps,
    "waterfall": pictures.waterfall,
    "timeline": pictures.timeline,
    "telemetry": telemetry,
    "roofline": roofline,
}
COMPARISON = "comparison.png"


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = FlagParser(
        prog="python profile/report.py",
        description="Show one report of profile/throughput.py, compare two, or show a sweep.",
    )
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT.json",
        help="one report to show, or two to compare; or the CSV file of a sweep",
    )
    parser.add_argument("--out", type=Path, help="folder to write to; default: that of the last report given")
    arguments = parser.parse_args(argv)
    paths, out = arguments.reports, arguments.out or arguments.reports[-1].parent
    if any(path.suffix == ".csv" for path in paths):
        if len(paths) > 1:
            raise UserError(f"{len(paths)} files, a sweep among them; give a sweep's CSV file alone")
        result = write_sweep(paths[0], out)
    elif len(paths) > 2:
        raise UserError(f"{len(paths)} reports; give one to show or two to compare")
    else:
        reports = [read_report(path) for path in paths]
        if len(reports) == 1:
            result = write_report(reports[0], out)
        else:
            result = write_comparison(reports[0], reports[1], [printable(str(path)) for path in paths], out)
    print(json.dumps(result))
    return 0


def write_report(report: Report, out: Path) -> dict:
    """Print the table, write report.html and the pictures into a folder, which is made where it is missing.

    Returns {"bound": what limits the run, "page": path, "pictures": {name: path, or None where there is nothing to draw}}. A
    picture of an earlier report for which this one has nothing to draw is removed. Raises UserError: the folder cannot be
    written; what was there is whole.
    """
    figures = {name: draw(report) for name, draw in PICTURES.items()}
    drawn = {name: figure if isinstance(figure, str) else png(figure) for name, figure in figures.items()}
    images = {name: picture if isinstance(picture, bytes) else None for name, picture in drawn.items()}
    _write({**{f"{name}.png": picture for name, picture in images.items()}, PAGE: page(report, drawn).encode()}, out)
    print_report(report)
    return {
        "bound": report.verdict.bound,
        "page": str(out / PAGE),
        "pictures": {name: str(out / f"{name}.png") if images[name] else None for name in images},
    }


def write_comparison(a: Report, b: Report, names: list[str], out: Path) -> dict:
    """Print the table of two reports and what differs, write the picture. Returns the figures. Raises UserError."""
    rows, differing = compare(a, b), differences(a, b)
    _write({COMPARISON: png(comparison(rows, names))}, out)
    console = Console()
    for letter, name, report in zip("AB", names, (a, b), strict=True):
        lines = [f"{letter}: {name}", words.subject(report), report.verdict.sentence]
        lines += [f"Caution: {sentence}" for sentence in report.verdict.cautions]
        console.print(Text("\n   ".join(map(printable, lines))))
    for table in comparison_tables(rows, a, b):
        words.print_table(table)
    console.print(
        "Clocks, caches and neighbours change from run to run, and no interval has that in it: measure both runs again."
    )
    if differing:
        table = [
            {"": key, "A": words.text_of(in_a), "B": words.text_of(in_b)} for key, (in_a, in_b) in differing.items()
        ]
        words.print_table(table, "What differs")
    else:
        console.print("Configuration, hardware and code are the same.")
    return {"rows": msgspec.to_builtins(rows), "differences": differing, "picture": str(out / COMPARISON)}


def write_sweep(path: Path, out: Path) -> dict:
    """Print a table for each program of a sweep, write its plots. Returns the figures' paths. Raises UserError."""
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: no rows; run a sweep first, as sweeps/lr.sh")
    groups = by_program(rows)
    names = {program: f"{path.stem}-{Path(program).stem}.png" for program in groups}
    figures = {program: plot_sweep(group, path.stem) for program, group in groups.items()}
    _write({names[program]: png(figure) if figure else None for program, figure in figures.items()}, out)
    console = Console()
    for program, group in groups.items():
        header, lines = sweep_table(group)
        words.print_table([dict(zip(header, line, strict=True)) for line in lines], f"{path.stem}: {program}")
    failed = [row for row in rows if row[ERROR]]
    if failed:
        console.print(f"{len(failed)} of {len(rows)} runs failed.")
    return {
        "rows": len(rows),
        "failed": len(failed),
        "varies": {program: varying(group) for program, group in groups.items()},
        "pictures": {program: str(out / names[program]) if figures[program] else None for program in groups},
    }


def print_report(report: Report) -> None:
    """How fast, what limits, how sure, what to do; then the tables. For people."""
    console, verdict = Console(), report.verdict

    def say(*parts: str, style: str = "") -> None:
        """In one line; only the first part has the style."""
        first, *others = map(printable, parts)
        console.print(Text.assemble((first, style), *others))

    say(words.subject(report), style="dim")
    say(verdict.sentence, style="bold")
    say(
        f"{words.number(words.headline_rate(report).images_per_second)} images/s",
        f" {words.speed_sentence(report)}",
        style="bold",
    )
    for name, value in words.verdict_evidence(report):
        say(f"  {name}: {value}")
    say(words.surety(report), f": {words.surety_sentence(report)}", style="bold")
    for sentence in verdict.cautions:
        say(f"Caution: {sentence}", style="yellow")
    for place, advice in enumerate(verdict.tries, start=1):
        say(f"  {place}. {advice.flags}", f"  {advice.why}", style="bold")
    words.print_table(words.stage_table(report))
    say(words.SLOW_STEPS)
    words.print_table(words.part_table(report))
    if costs := cost_table(report):
        words.print_table(costs)
    for sentence in (words.ceiling_sentence(report), words.warm_up_sentence(report), words.memory_sentence(report)):
        say(sentence)


def _write(files: dict[str, bytes | None], out: Path) -> None:
    """Each file whole or not at all; None: not to be there. Raises UserError."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content is None:
                (out / name).unlink(missing_ok=True)
                continue
            with replacing(out / name) as file:
                file.write(content)
