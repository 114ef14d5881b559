"""Two reports against each other: how many times as fast B is, stage by stage, and in what the runs differ."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from perf.plot_style import BLUE, GREY, ORANGE, lanes, new_figure
from perf.report_format import find
from perf.report_words import NOT_MEASURED, PARTS, STAGES, number, part_summary, ratio

RATE, TIME = "images/s", "µs/image"


def compare(a: dict, b: dict) -> list[dict]:
    """One row for each stage (images per second) and each part of a step (microseconds an image: batches may differ).

    Keys: name; unit; a and b: [median, p5, p95] or None; times_as_fast: B against A, above 1 where B is faster, by medians;
    spreads_overlap: whether the ranges from p5 to p95 have anything in common. The last two are None where one was not measured.
    """
    rows = []
    for key, name in STAGES.items():
        figures = [_figures(find(report, f"stages.{key}.images_per_second"), 1.0) for report in (a, b)]
        rows.append(_row(name, RATE, *figures))
    for key, name in PARTS.items():
        scales = [ratio(1e6, find(report, "config.batch_size")) for report in (a, b)]
        figures = [_figures(part_summary(report, key), scale) for report, scale in zip((a, b), scales, strict=True)]
        rows.append(_row(name, TIME, *figures))
    return rows


def differences(a: dict, b: dict) -> dict[str, list]:
    """[value in A, value in B] of every setting, and everything of the hardware and the code, that is not the same."""
    found = {}
    for part in ("config", "hardware"):
        ours, theirs = a[part] or {}, b[part] or {}
        for key in dict.fromkeys((*ours, *theirs)):
            if ours.get(key) != theirs.get(key):
                found[f"{part}.{key}"] = [ours.get(key), theirs.get(key)]
    if a["git_revision"] != b["git_revision"]:
        found["git_revision"] = [a["git_revision"], b["git_revision"]]
    return found


def comparison(rows: list[dict], names: Sequence[str]) -> Figure:
    """Each row's ratio, with the widest range that the two spreads allow. names: of A and of B."""
    figure = new_figure(0.42 * len(rows) + 1.6, f"A: {names[0]}\nB: {names[1]}")
    axes = figure.subplots()
    beside, ends = axes.get_yaxis_transform(), [0.9, 1.1]
    for lane, row in enumerate(rows):
        times = row["times_as_fast"]
        if times is None:
            why = "no ratio" if row["a"] and row["b"] else f"{NOT_MEASURED} in both"
            axes.text(1.02, lane, why, va="center", color=GREY, transform=beside)
            continue
        low, high = _extremes(row)
        colour = GREY if row["spreads_overlap"] else BLUE if times > 1 else ORANGE
        axes.plot([low, high], [lane, lane], color=colour, linewidth=2, marker="|")
        axes.plot([times], [lane], marker="o", color=colour, markersize=8, label=row["name"])
        text = f"× {number(times)}  ({number(row['a'][0])} → {number(row['b'][0])} {row['unit']})"
        axes.text(1.02, lane, text, va="center", transform=beside)
        ends += [low, high]
    axes.axvline(1.0, color="black", linewidth=1)
    lanes(axes, [row["name"] for row in rows])
    axes.set(
        xscale="log",
        xlim=(min(ends) / 1.1, max(ends) * 1.1),
        xlabel="how many times as fast B is\n(bar: what the spreads allow; grey: they overlap)",
    )
    axes.xaxis.set_major_locator(FixedLocator(_few_between(min(ends) / 1.1, max(ends) * 1.1)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def comparison_tables(rows: list[dict]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows in words, for the stages and for the parts of a step."""
    tables = []
    for unit in (RATE, TIME):
        lines = []
        for row in rows:
            if row["unit"] != unit:
                continue
            cells = [row["name"]]
            for figures in (row["a"], row["b"]):
                spread = "" if figures is None else f"{number(figures[1])}–{number(figures[2])}"
                cells += [number(figures[0] if figures else None), spread]
            times = row["times_as_fast"]
            cells += ["", ""] if times is None else [f"× {times:.3f}", "overlap" if row["spreads_overlap"] else "apart"]
            lines.append(cells)
        tables.append(([unit, "A", "p5–p95", "B", "p5–p95", "B's speed", "spreads"], lines))
    return tables


def _few_between(low: float, high: float) -> list[float]:
    """At most five round numbers, 1 among them, for a logarithmic axis from `low` to `high`, which 1 lies between."""
    if high / low < 3:
        step = 0.1 if high - low < 0.7 else 0.25
        return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits, stride in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in (1, 2, 3, 5, 10))):
        decades = [decade for decade in range(lowest, highest + 1) if decade % stride == 0]
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(ticks) <= 5:
            break
    return ticks


def _figures(summary: dict | None, scale: float | None) -> list[float] | None:
    if summary is None or scale is None:
        return None
    values = [summary[key] for key in ("median", "p5", "p95")]
    return None if None in values else [scale * value for value in values]


def _row(name: str, unit: str, a: list[float] | None, b: list[float] | None) -> dict[str, Any]:
    times = overlap = None
    if a and b and a[0] > 0 and b[0] > 0:
        times = ratio(b[0], a[0]) if unit == RATE else ratio(a[0], b[0])
        overlap = a[1] <= b[2] and b[1] <= a[2]
    return {"name": name, "unit": unit, "a": a, "b": b, "times_as_fast": times, "spreads_overlap": overlap}


def _extremes(row: dict) -> tuple[float, float]:
    """The lowest and the highest ratio of speeds that two values within the spreads have.

    An end of a spread that is 0 or less, as that of a difference of two times can be, has no ratio: the median stands for it.
    """
    a, b = ([value if value > 0 else figures[0] for value in figures] for figures in (row["a"], row["b"]))
    over, under = (b, a) if row["unit"] == RATE else (a, b)
    return over[1] / under[2], over[2] / under[1]
