"""The figures of a sweep over what varies in it: one panel a figure, one colour for each setting that is not on the axis."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from common.progress import printable
from perf.plot_style import DEVICE_COLOURS, new_figure
from perf.report_words import name_of
from perf.sweep_report import FIGURES, as_number, in_order, independent, setting, value_of, varying
from perf.sweep_table import ERROR, Row

_INCHES_A_PANEL = 2.3
_LOG_RATIO = 8.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""
EFFICIENCY = "training, % of fewest ranks'"
_RATES = ("training_images_per_second", "images_per_second")


class Point(NamedTuple):
    """What runs with one value on the axis gave."""

    place: float
    mean: float
    lowest: float
    highest: float


def plot_sweep(rows: Sequence[Row], title: str) -> Figure | None:
    """Of runs of one program. None where no run gave results.

    On the axis is the number that varies most; where none does, the names that vary most. Runs that differ in their seeds alone
    are one point, their mean, with a bar from the lowest to the highest; single measurements have their p5–p95. Where ranks
    vary there is a panel with each rank's speed in % of what it has with the fewest ranks.
    """
    done = [row for row in rows if not row[ERROR]]
    if not done:
        return None
    columns = independent(done, varying(done))
    axis = axis_of(done, columns)
    series = series_of(done, [name for name in columns if name not in (axis, "seed")])
    panels = {column: name for column, name in FIGURES[done[0]["program"]].items() if _measured(done, column)}
    if not panels:
        return None
    has_efficiency = axis == "ranks"
    count = len(panels) + has_efficiency
    figure = new_figure(_INCHES_A_PANEL * count + 1.0, f"{printable(title)}: {_subject(done)}")
    all_axes = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
    places = places_of(done, axis)
    line = "-" if _are_numbers(places) else ""  # between two names there is nothing
    for axes, (column, name) in zip(all_axes, panels.items(), strict=False):
        for number, (label, members) in enumerate(series.items()):
            _draw(axes, points_of(members, axis, column, places), label, number, line)
        axes.set_ylabel(name)
    if has_efficiency:
        rate = next(column for column in _RATES if column in panels)
        for number, (label, members) in enumerate(series.items()):
            _draw(all_axes[-1], efficiency(points_of(members, axis, rate, places)), label, number, line)
        all_axes[-1].set_ylabel(EFFICIENCY)
    for axes in all_axes:
        axes.grid(alpha=0.3)
        if not axes.get_ylabel().startswith("validation"):
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
    if axis is None:
        return {"": 0.0}
    texts = list(dict.fromkeys(row.get(axis, "") for row in in_order(rows, [axis])))
    numbers = [as_number(text) for text in texts]
    return {
        text: place if number is None or None in numbers else number
        for place, (text, number) in enumerate(zip(texts, numbers, strict=True))
    }


def points_of(rows: Sequence[Row], axis: str | None, column: str, places: dict[str, float]) -> list[Point]:
    """One for each place where something was measured."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if value_of(row, column) is not None:
            found.setdefault(places[row.get(axis, "") if axis else ""], []).append(row)
    points = []
    for place, members in sorted(found.items()):
        values = [value for row in members if (value := value_of(row, column)) is not None]
        ends = [value_of(members[0], f"{column}_{end}") for end in ("p5", "p95")] if len(values) == 1 else []
        spread = [*values, *(end for end in ends if end is not None)]
        points.append(Point(place, sum(values) / len(values), min(spread), max(spread)))
    return points


def efficiency(points: Sequence[Point]) -> list[Point]:
    """Of rates over ranks: the rate of each rank, in percent of that with the fewest ranks."""
    if not points or not points[0].mean:
        return []
    scale = 100 * points[0].place / points[0].mean
    return [
        Point(point.place, *(scale * value / point.place for value in (point.mean, point.lowest, point.highest)))
        for point in points
    ]


def _draw(axes: Axes, points: Sequence[Point], label: str, number: int, line: str) -> None:
    if not points:
        return
    colour = DEVICE_COLOURS[number % len(DEVICE_COLOURS)]
    ends = [[point.mean - point.lowest for point in points], [point.highest - point.mean for point in points]]
    places, means = [point.place for point in points], [point.mean for point in points]
    axes.errorbar(places, means, yerr=ends, color=colour, marker="o", linestyle=line, capsize=3, label=label)


def _are_numbers(places: dict[str, float]) -> bool:
    return all(as_number(text) == place for text, place in places.items())


def _measured(rows: Sequence[Row], column: str) -> bool:
    return any(value_of(row, column) is not None for row in rows)


def _label_axis(axes: Axes, axis: str | None, places: dict[str, float]) -> None:
    low, high = min(places.values()), max(places.values())
    numbers = _are_numbers(places)
    if numbers and low > 0 and high / low >= _LOG_RATIO:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places.values()), list(map(printable, places)), parse_math=False)
    if not numbers:
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.set_xlabel("" if axis is None else name_of(axis), parse_math=False)


def _subject(rows: Sequence[Row]) -> str:
    """What is the same in all runs, of what one asks first."""
    same = {name: {printable(row.get(name, "")) for row in rows} for name in ("arch", "data", "card")}
    known = {name: values.pop() for name, values in same.items() if len(values) == 1}
    words = [known.get("arch", ""), f"on {known['data']}" if "data" in known else "", known.get("card", "")]
    return " ".join(filter(None, words[:2])) + (f"\n{words[2]}" if words[2] else "")
