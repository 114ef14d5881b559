"""From what the hardware allows to what training achieves: one bar for each level, one for what is lost on the way."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.plot_style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, lanes, new_figure
from perf.report_format import find
from perf.report_words import NOT_MEASURED, SET_BY, STAGES, number, percent, ratio, subject

_COLOURS = {"floor": GREY, "step": SKY, "ceiling": ORANGE, "training": BLUE}
_NOTHING = 1e-3  # of a rate: a difference that is rounding


def levels(report: dict) -> dict[str, float | None]:
    """Images per second of all ranks at each level, from the top; None: not measured, or nothing was done."""
    rates = {
        "floor": ratio(find(report, "config.batch_size"), find(report, "roofline.floor_seconds.total")),
        "step": find(report, "stages.step.images_per_second.median"),
        "ceiling": find(report, "ceiling.images_per_second"),
        "training": find(report, "stages.training.images_per_second.median"),
    }
    return {name: rate if rate is not None and rate > 0 else None for name, rate in rates.items()}


def waterfall(report: dict) -> Figure | str:
    """The picture, or why there is none."""
    rates = levels(report)
    largest = max((rate for rate in rates.values() if rate is not None), default=None)
    if largest is None:
        return "No rate was measured, so there is no waterfall."
    set_by = find(report, "ceiling.set_by")
    names = {
        "floor": "hardware's limit",
        "step": "step alone",
        "ceiling": f"ceiling, set by\n{SET_BY.get(set_by, set_by)}",
        "training": "training achieved",
    }
    losses = {
        "step": "lost in the step",
        "ceiling": "lost to the loader" if set_by in SET_BY else "lost to shared cores",
        "training": "lost in the loop",
    }
    figure = new_figure(4.6, f"From ceiling to achieved\n{subject(report)}")
    axes = figure.subplots()
    labels: list[str] = []
    before: float | None = None
    for level, rate in rates.items():
        if rate is None:
            axes.text(0, len(labels), f" {NOT_MEASURED}", va="center", color=GREY)
        else:
            if before is not None:
                _draw_change(axes, len(labels), before, rate)
                labels.append(losses[level] if rate <= before else "more than that")
            spread = find(report, f"stages.{level}.images_per_second") if level in STAGES else None
            _draw_level(axes, len(labels), rate, spread, _COLOURS[level])
            before = rate
        labels.append(names[level])
    lanes(axes, labels)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set(xlim=(0, 1.5 * largest), xlabel="images/s, all ranks together (whisker: p5–p95)")
    return figure


def _draw_level(axes: Axes, lane: int, rate: float, spread: dict | None, colour: str) -> None:
    axes.barh(lane, rate, height=0.7, color=colour)
    end = rate
    if spread and spread["p5"] is not None and spread["p95"] is not None:
        axes.plot([spread["p5"], spread["p95"]], [lane, lane], color="black", linewidth=1.5, marker="|")
        end = max(rate, spread["p95"])
    axes.text(end, lane, f"  {number(rate)}/s · {number(1e3 / rate)} ms/image", va="center", weight="bold")


def _draw_change(axes: Axes, lane: int, before: float, after: float) -> None:
    change = after - before
    if abs(change) < _NOTHING * before:  # rounding
        change = 0.0
    sign, colour = ("−", VERMILION) if change < 0 else ("+", GREEN) if change > 0 else ("", GREY)
    axes.barh(lane, change, left=before, height=0.5, color=colour)
    text = f" {sign}{number(abs(change))} ({percent(abs(change) / before, 0)})"
    axes.text(max(before, after), lane, text, va="center", color=colour)
    for rate, end in ((before, lane - 0.65), (after, lane + 0.65)):
        axes.plot([rate, rate], [lane, end], color=GREY, linewidth=0.8)
