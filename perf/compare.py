"""Two reports against each other: how many times as fast B is, with what certainty, and in what the runs differ."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from msgspec.structs import asdict

from engine.monitoring.compare_runs import differing_flags
from perf.plot_style import BLUE, GREY, ORANGE, lanes, new_figure
from perf.report import Rate, Record, Report
from perf.words import NOT_MEASURED, PARTS, STAGES, Table, interval_of, number, parts_of, ratio

RATE, TIME = "images/s", "µs/image"
FASTER, SLOWER, UNDECIDED = "faster", "slower", "no difference shown"


class Row(Record):
    """A stage (images per second) or a part of a step (microseconds an image, by the mean: batches may differ)."""

    name: str
    unit: str
    a: float | None
    b: float | None
    """None: not measured."""
    times_as_fast: float | None
    """B against A, above 1 where B is faster; None where one was not measured, or is 0."""
    interval: tuple[float, float] | None
    """Of times_as_fast, 95 % confidence. None for parts of a step, and for rates without an interval."""
    verdict: str | None
    """FASTER or SLOWER where the interval is on one side of 1, else UNDECIDED; None without an interval."""


def compare(a: Report, b: Report) -> list[Row]:
    """A row for each stage and each part of a step. What changes from one run to the next is in no interval."""
    rows = [_stage_row(name, getattr(a.stages, key), getattr(b.stages, key)) for key, name in STAGES.items()]
    for key, name in PARTS.items():
        ours, theirs = (_microseconds_an_image(report, key) for report in (a, b))
        times = ratio(ours, theirs) or None  # a part that takes no time has none
        rows.append(Row(name=name, unit=TIME, a=ours, b=theirs, times_as_fast=times, interval=None, verdict=None))
    return rows


def interval_of_ratio(over: Rate, under: Rate) -> tuple[float, float] | None:
    """95 % confidence interval of the ratio of two rates that were measured apart from each other.

    Each rate's interval is, on the logarithmic scale, an error to either side; errors of independent measurements add up in
    squares. Lower end of the ratio: from over's lower and under's upper end. None where a rate has no interval.
    """
    if over.interval is None or under.interval is None or over.interval[0] <= 0 or under.interval[0] <= 0:
        return None
    low_over, high_over = (abs(math.log(end / over.images_per_second)) for end in over.interval)
    low_under, high_under = (abs(math.log(end / under.images_per_second)) for end in under.interval)
    times = over.images_per_second / under.images_per_second
    return times * math.exp(-math.hypot(low_over, high_under)), times * math.exp(math.hypot(high_over, low_under))


def differences(a: Report, b: Report) -> dict[str, list[Any]]:
    """[value in A, value in B] of every setting, and everything of the hardware and the code, that is not the same."""
    found: dict[str, list[Any]] = {}
    for name, pair in (("config", (a.config, b.config)), ("hardware", (asdict(a.hardware), asdict(b.hardware)))):
        found |= {f"{name}.{key}": [each.get(key) for each in pair] for key in differing_flags(pair)}
    if a.git_revision != b.git_revision:
        found["git_revision"] = [a.git_revision, b.git_revision]
    return found


def comparison(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Each row's ratio, with its interval. names: of A and of B."""
    figure = new_figure(0.42 * len(rows) + 1.8, f"A: {names[0]}\nB: {names[1]}")
    axes = figure.subplots()
    beside, colours = axes.get_yaxis_transform(), {FASTER: BLUE, SLOWER: ORANGE}
    for lane, row in enumerate(rows):
        if row.times_as_fast is None:
            why = f"{NOT_MEASURED} in both" if row.a is None or row.b is None else "no ratio"
            axes.text(1.02, lane, why, va="center", color=GREY, transform=beside)
            continue
        low, high = row.interval or (row.times_as_fast, row.times_as_fast)
        colour = colours.get(row.verdict or "", GREY)
        axes.plot([low, high], [lane, lane], color=colour, linewidth=2, marker="|" if row.interval else "")
        fill = colour if row.interval else "white"
        axes.plot(row.times_as_fast, lane, marker="o", color=colour, markerfacecolor=fill, markersize=8, label=row.name)
        text = f"× {number(row.times_as_fast)}  ({number(row.a)} → {number(row.b)} {row.unit})"
        axes.text(1.02, lane, text, va="center", transform=beside)
    axes.axvline(1.0, color="black", linewidth=1)
    lanes(axes, [row.name for row in rows])
    axes.update_datalim([(0.9, 0), (1.1, 0)])
    axes.set(xscale="log", xmargin=0.06)
    axes.set_xlabel(
        "how many times as fast B is\n(bar: 95 % confidence; grey: no difference shown;\nhollow: no interval)"
    )
    low, high = axes.get_xlim()
    locator = MaxNLocator(4) if high / low < 10 else LogLocator(subs=(1, 3) if high / low < 100 else (1,), numticks=5)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def comparison_tables(rows: Sequence[Row], a: Report, b: Report) -> list[Table]:
    """For the stages, with their intervals, and for the parts of a step. rows: those of compare()."""
    times = ["" if row.times_as_fast is None else f"× {row.times_as_fast:.3f}" for row in rows]
    stages = []
    for key, row, faster in zip(STAGES, rows, times, strict=False):
        rates = (getattr(report.stages, key) for report in (a, b))
        of_a, of_b = (interval_of(rate) if rate else "" for rate in rates)
        interval = "" if row.interval is None else "–".join(f"{end:.3f}" for end in row.interval)
        cells = {RATE: row.name, "A": number(row.a), "A's 95 %": of_a, "B": number(row.b), "B's 95 %": of_b}
        stages.append({**cells, "B's speed": faster, "its 95 %": interval, "B is": row.verdict or ""})
    parts = [
        {TIME: row.name, "A": number(row.a), "B": number(row.b), "B's speed": faster}
        for row, faster in zip(rows, times, strict=True)
        if row.unit == TIME
    ]
    return [stages, parts]


def _stage_row(name: str, a: Rate | None, b: Rate | None) -> Row:
    ours, theirs = (rate.images_per_second if rate else None for rate in (a, b))
    interval = interval_of_ratio(b, a) if a and b else None
    verdict = interval and (FASTER if interval[0] > 1 else SLOWER if interval[1] < 1 else UNDECIDED)
    return Row(
        name=name, unit=RATE, a=ours, b=theirs, times_as_fast=ratio(theirs, ours), interval=interval, verdict=verdict
    )


def _microseconds_an_image(report: Report, key: str) -> float | None:
    """Of one of PARTS in the step alone; the data wait is training's."""
    part = parts_of(report).get(key)
    seconds = part and (part.training if key == "data_wait" else part.alone)
    return None if seconds is None else 1e6 * seconds / report.config["batch_size"]
