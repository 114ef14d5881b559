"""A sweep in words and pictures: what varies in it and what was measured, as a table, and one over the other in plots.

In a plot there is one panel a figure, and one colour for each setting that is not on the axis.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.progress import printable
from perf.plot_style import DEVICE_COLOURS, new_figure
from perf.sweep import ENDS, RATES, RECORDS, RESULTS, THROUGHPUT, TRAIN
from perf.sweep_table import ERROR, Row
from perf.words import name_of, number, text_of

FIGURES = {
    TRAIN: {"best_top1": "best top-1, %", "validation_loss": "validation loss", "images_per_second": "images/s"},
    THROUGHPUT: {rate: f"{rate.partition('_')[0]}, images/s" for rate in RATES[:3]},
}
"""What a table and a plot show of each program's results, with their names."""
EFFICIENCY = "training, % of fewest ranks'"
_RATES_OVER_RANKS = (RATES[0], "images_per_second")
_SHORT_REVISION = 8
_INCHES_A_PANEL = 2.3
_LOG_RATIO = 8.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""


def by_program(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each program; rows of programs that are not known here are left out."""
    return {name: found for name in FIGURES if (found := [row for row in rows if row.get("program") == name])}


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings, ranks, card and revision among them, that have more than one value in these rows."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in (*RESULTS, *RECORDS)]
    return [name for name in columns if len({row.get(name, "") for row in rows}) > 1]


def independent(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Those of some columns that are left when each that the others determine is dropped, as is the batch in weak scaling.

    Of columns that determine each other the first stays, but card and revision only where nothing else tells rows apart.
    """
    left = list(columns)
    first_to_go = [name for name in columns if name in ("card", "git_revision")]
    for name in (*first_to_go, *(name for name in reversed(columns) if name not in first_to_go)):
        others = [other for other in left if other != name]
        keys = [tuple(row.get(other, "") for other in others) for row in rows]
        if others and len(set(keys)) == len({(key, row.get(name, "")) for key, row in zip(keys, rows, strict=True)}):
            left = others
    return left


def value_of(row: Row, column: str) -> float | None:
    """A figure of a run, in the unit of FIGURES; None: not measured."""
    value = as_number(row.get(column, ""))
    return value and value * (100 if column == "best_top1" else 1)


def as_number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def in_order(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Sorted by these columns, numbers by their size."""

    def key(row: Row) -> list[tuple[bool, float, str]]:
        texts = [row.get(name, "") for name in columns]
        return [(as_number(text) is None, as_number(text) or 0.0, text) for text in texts]

    return sorted(rows, key=key)


def sweep_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows in words, of runs of one program: what varies, what was measured, and why a run failed."""
    columns, figures = varying(rows), FIGURES[rows[0]["program"]]
    has_errors = any(row[ERROR] for row in rows)
    header = [*map(name_of, columns), *figures.values(), *(["error"] if has_errors else [])]
    lines = []
    for row in in_order(rows, columns):
        cells = [setting(row, name) for name in columns]
        cells += ["" if row[ERROR] else number(value_of(row, column)) for column in figures]
        lines.append(cells + ([text_of(row[ERROR])] if has_errors else []))
    return header, lines


def setting(row: Row, column: str) -> str:
    """The value of a setting, for people."""
    value = row.get(column, "")
    if column == "git_revision":
        commit, plus, changes = value.partition("+")
        return commit[:_SHORT_REVISION] + plus + changes
    return text_of(value) or "none"


class Point(NamedTuple):
    """What runs with one value on the axis gave."""

    place: float
    mean: float
    lowest: float
    highest: float


def plot_sweep(rows: Sequence[Row], title: str) -> Figure | None:
    """Of runs of one program. None where no run gave results.

    On the axis is the number that varies most; where none does, the names that vary most. Runs that differ in their seeds alone
    are one point, their mean, with a bar from the lowest to the highest; single measurements have their interval. Where ranks
    vary there is a panel with each rank's speed in % of what it has with the fewest ranks.
    """
    done = [row for row in rows if not row[ERROR]]
    columns = independent(done, varying(done))
    axis = axis_of(done, columns)
    series = series_of(done, [name for name in columns if name not in (axis, "seed")])
    places = places_of(done, axis)
    figures = FIGURES[done[0]["program"]] if done else {}
    panels = [
        (name, column) for column, name in figures.items() if any(value_of(row, column) is not None for row in done)
    ]
    if axis == "ranks":
        panels += [(EFFICIENCY, column) for _, column in panels if column in _RATES_OVER_RANKS]
    if not panels:
        return None
    figure = new_figure(_INCHES_A_PANEL * len(panels) + 1.0, f"{printable(title)}: {_subject(done)}")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    line = "-" if _are_numbers(places) else ""  # between two names there is nothing
    for axes, (name, column) in zip(all_axes, panels, strict=True):
        for colour, (label, members) in zip(itertools.cycle(DEVICE_COLOURS), series.items(), strict=False):
            points = points_of(members, axis, column, places)
            if name == EFFICIENCY:
                points = efficiency(points)
            if points:
                x, means, lowest, highest = map(np.array, zip(*points, strict=True))
                ends = [means - lowest, highest - means]
                axes.errorbar(x, means, yerr=ends, color=colour, marker="o", linestyle=line, capsize=3, label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if not name.startswith("validation"):
            axes.set_ylim(bottom=0)
    _label_axis(all_axes[-1], axis, places)
    if list(series) != [""]:
        legend = figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def axis_of(rows: Sequence[Row], columns: Sequence[str]) -> str | None:
    """The column for the axis: numbers before names, the one with the most values; the seed only if there is nothing else."""

    def rank(name: str) -> tuple[bool, bool, int]:
        values = {row.get(name, "") for row in rows}
        return name != "seed", all(as_number(value) is not None for value in values), len(values)

    return max(columns, key=rank, default=None)


def series_of(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, list[Row]]:
    """Label → rows that have the same values in these columns; one with an empty label where there are no columns."""
    series: dict[str, list[Row]] = {}
    for row in in_order(rows, columns):
        label = ", ".join(f"{name_of(name)} {setting(row, name)}" for name in columns)
        series.setdefault(label, []).append(row)
    return series


def places_of(rows: Sequence[Row], axis: str | None) -> dict[str, float]:
    """Value on the axis → where it is: a number at its place, names one after the other."""
    texts = list(dict.fromkeys(row.get(axis, "") for row in in_order(rows, [axis]))) if axis else [""]
    numbers = [number for text in texts if (number := as_number(text)) is not None]
    return dict(zip(texts, numbers if len(numbers) == len(texts) else map(float, range(len(texts))), strict=True))


def points_of(rows: Sequence[Row], axis: str | None, column: str, places: dict[str, float]) -> list[Point]:
    """One for each place where something was measured."""
    found: dict[float, list[tuple[float, Row]]] = {}
    for row in rows:
        if (value := value_of(row, column)) is not None:
            found.setdefault(places[row.get(axis, "") if axis else ""], []).append((value, row))
    points = []
    for place, members in sorted(found.items()):
        values = [value for value, _ in members]
        ends = [value_of(members[0][1], f"{column}{end}") for end in ENDS] if len(values) == 1 else []
        spread = values + [end for end in ends if end is not None]
        points.append(Point(place, sum(values) / len(values), min(spread), max(spread)))
    return points


def efficiency(points: Sequence[Point]) -> list[Point]:
    """Of rates over ranks: the rate of each rank, in percent of that with the fewest ranks."""
    if not points or not points[0].mean:
        return []
    scale = 100 * points[0].place / points[0].mean
    return [Point(place, *(scale * value / place for value in values)) for place, *values in points]


def _are_numbers(places: dict[str, float]) -> bool:
    return all(as_number(text) == place for text, place in places.items())


def _label_axis(axes: Axes, axis: str | None, places: dict[str, float]) -> None:
    low, high = min(places.values()), max(places.values())
    if not _are_numbers(places):
        axes.set_xlim(low - 0.5, high + 0.5)
    elif low > 0 and high / low >= _LOG_RATIO:
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(list(places.values()), list(map(printable, places)), parse_math=False)
    axes.set_xlabel("" if axis is None else name_of(axis), parse_math=False)


def _subject(rows: Sequence[Row]) -> str:
    """What is the same in all runs, of what one asks first."""
    same = {name: {printable(row.get(name, "")) for row in rows} for name in ("arch", "data", "card")}
    known = {name: values.pop() for name, values in same.items() if len(values) == 1}
    words = [known.get("arch", ""), f"on {known['data']}" if "data" in known else "", known.get("card", "")]
    return " ".join(filter(None, words[:2])) + (f"\n{words[2]}" if words[2] else "")
