"""One median step as a Gantt chart: each part where it starts and how long it takes, above the hardware's floor for it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, lanes, new_figure
from perf.report_format import find
from perf.report_words import NOT_MEASURED, PARTS, floors_of_parts, number, part_summary, parts_of, subject

_COLOURS = dict(zip(PARTS, (ORANGE, SKY, BLUE, VERMILION, GREEN), strict=True))
_WHOLE = "#444444"


def timeline(report: dict) -> Figure | str:
    """The picture, or why there is none.

    The data wait and the whole step are training's; the other parts were measured in the step alone.
    """
    seconds = {part: (part_summary(report, part) or {}).get("median") for part in parts_of(report)}
    if all(median is None for median in seconds.values()):
        return "The parts of a step were not measured, so there is no timeline."
    floors = floors_of_parts(report)
    figure = new_figure(4.2, f"One step, part by part\n{subject(report)}")
    axes = figure.subplots()
    labels: list[str] = []
    start = floor_start = 0.0
    for part, title in parts_of(report).items():
        _draw_lane(axes, len(labels), _COLOURS[part], start, seconds[part], floor_start, floors.get(part))
        labels.append(title)
        start += seconds[part] or 0
        floor_start += floors.get(part) or 0
    trained = find(report, "stages.training.seconds_per_step.median")
    whole = find(report, "stages.step.seconds_per_step.median") if trained is None else trained
    if whole is not None and whole > start:
        _draw_lane(axes, len(labels), PURPLE, start, whole - start, 0.0, None)
        labels.append("in none of these")
    _draw_lane(axes, len(labels), _WHOLE, 0.0, whole, 0.0, find(report, "roofline.floor_seconds.total"))
    labels.append("whole step" if trained is None else "whole step\nin training")
    lanes(axes, labels)
    axes.set_xlabel("ms from the start of the step (full: measured median; hatched: hardware floor)")
    axes.set_xlim(0, 1.35 * max(axes.dataLim.x1, 1e-6))  # room for the text
    return figure


def _draw_lane(
    axes: Axes,
    lane: int,
    colour: str,
    start: float,
    seconds: float | None,
    floor_start: float,
    floor_seconds: float | None,
) -> None:
    """A bar for what was measured, one for the floor, and both in words behind the longer one."""
    words, end = [NOT_MEASURED], 0.0
    if seconds is not None:
        axes.barh(lane - 0.13, 1e3 * seconds, left=1e3 * start, height=0.46, color=colour)
        words, end = [f"{number(1e3 * seconds)} ms"], start + seconds
    if floor_seconds is not None:
        bar = axes.barh(lane + 0.26, 1e3 * floor_seconds, left=1e3 * floor_start, height=0.24)
        for patch in bar:  # without a width, its edge would still be a line
            patch.set(facecolor="white", edgecolor=GREY, hatch="/////", visible=floor_seconds > 0)
        words.append(f"floor {number(1e3 * floor_seconds)}")
        end = max(end, floor_start + floor_seconds)
    axes.annotate(", ".join(words), (1e3 * end, lane - 0.1), (5, 0), textcoords="offset points", va="center")
