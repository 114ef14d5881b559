"""The pictures of a run's time: every step in order, from the hardware's limit to what training achieves, one step by its parts.

Each function takes a report and returns a figure, or the sentence that says why there is none.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from perf import words
from perf.bottlenecks import floor_of_passes
from perf.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, lanes, new_figure
from perf.report import Rate, Report

_NOTHING = 1e-3  # of a rate: a difference that is rounding
_BINS = 40


# ---- every step in order -----------------------------------------------------------------------------------------

_STRIPS = ("training", "step", "loader")
_FEW = 300  # points of a strip that are apart from each other


def steps(report: Report) -> Figure | str:
    """Step times in the order in which they were measured, and their histogram, of the stages that a reader asks of first."""
    rates = {name: rate for name in _STRIPS if (rate := getattr(report.stages, name)) and rate.series_seconds}
    if not rates:
        return "No single steps were timed, so there is no picture of them."
    figure = new_figure(
        0.6 + 1.9 * len(rates), f"Every step in order, and how many took how long\n{words.subject(report)}"
    )
    all_axes = figure.subplots(len(rates), 2, sharey="row", squeeze=False, width_ratios=(4, 1))
    for (strip, histogram), (name, rate) in zip(all_axes, rates.items(), strict=True):
        _draw_steps(strip, histogram, words.STAGES[name], rate)
    all_axes[-1, 0].set_xlabel("lap, in order (line: mean of all; red: over twice the median)")
    all_axes[-1, 1].set_xlabel("number of laps")
    return figure


def _draw_steps(strip: Axes, histogram: Axes, title: str, rate: Rate) -> None:
    times, places = 1e3 * np.array(rate.series_seconds), np.arange(len(rate.series_seconds))
    mean, median = 1e3 * rate.step_seconds.mean, 1e3 * rate.step_seconds.median
    slow, top, few = times > words.SLOW * median, 1.12 * times.max(), len(times) <= _FEW
    strip.vlines(places, 0, times, color=np.where(slow, VERMILION, SKY), linewidth=1.2 if few else 0.5)
    strip.plot(places[~slow], times[~slow], ".", color=BLUE, markersize=4 if few else 1.5)
    strip.plot(places[slow], times[slow], "o", color=VERMILION, markersize=4)
    strip.axhline(mean, color="black", linewidth=0.8)
    strip.set(ylim=(0, top), xlim=(-0.01 * len(times) - 0.5, 1.01 * len(times)))
    strip.xaxis.set_major_locator(MaxNLocator(integer=True))
    strip.set_ylabel("ms a step" if rate.steps_a_lap == 1 else f"ms a step,\nlaps of {rate.steps_a_lap}")
    count, share = words.slow_laps(rate)
    slow_words = f"{count} slow, {words.percent(share, 0)} of the time" if count else "none is slow"
    name = f"{title}: mean {words.number(mean)} ms, median {words.number(median)}; {slow_words}"
    strip.set_title(name, loc="left", fontsize=9.5)
    strip.grid(axis="y", alpha=0.3)
    # On a logarithmic axis, a single stall shows beside hundreds of steps.
    look: dict[str, Any] = {"stacked": True, "color": [BLUE, VERMILION], "orientation": "horizontal", "log": True}
    counts, *_ = histogram.hist([times[~slow], times[slow]], bins=_BINS, range=(0, top), **look)
    histogram.set_xlim(0.6, 1.6 * np.max(counts))
    histogram.xaxis.set_major_locator(LogLocator(numticks=5))
    histogram.xaxis.set_minor_locator(NullLocator())
    histogram.xaxis.set_major_formatter("{x:g}")
    histogram.grid(axis="x", alpha=0.3)


# ---- from the hardware's limit to training -----------------------------------------------------------------------

GAP = {
    "floor": "hardware's floor",
    "memory_passes": "unfused passes",
    "layers": "layers below roof",
    "rest": "rest of the step",
}


def gap_of_step(report: Report) -> dict[str, float]:
    """Seconds of a step alone by what they are for (GAP); they add up to it, or to the floor if that is longer.

    floor: all work at the hardware's peaks, bias, ReLU and dropout fused into the layers. memory_passes: these by themselves, at
    the memory's peak, as far as the step has not fused them. layers: what the layers, measured one by one and not compiled, take
    beyond their unfused floors. rest: all else, as an optimizer and an all-reduce below their peaks, starting kernels, the loss.
    Each is at most what the ones before it leave.
    """
    roofline = report.roofline
    fused, left = roofline.floor_seconds, report.stages.step.step_seconds.mean - roofline.floor_seconds.total
    beyond = sum(
        each.measured_seconds - each.floor_seconds_unfused
        for each in roofline.layers
        if each.measured_seconds is not None
    )
    found = {"floor": fused.total}
    for name, seconds in (
        ("memory_passes", floor_of_passes(report) - fused.forward - fused.backward),
        ("layers", beyond),
    ):
        found[name] = max(0.0, min(seconds, left))
        left -= found[name]
    return {**found, "rest": max(0.0, left)}


def waterfall(report: Report) -> Figure:
    """Images a second of all ranks: one bar for each level, one for each loss on the way."""
    batch, step, trained = report.config["batch_size"], report.stages.step, report.stages.training
    set_by, seconds = report.ceiling.set_by, gap_of_step(report)
    figure = new_figure(5.4, f"From the hardware's limit to what training achieves\n{words.subject(report)}")
    axes, floor = figure.subplots(), seconds["floor"]
    unfused, layers = floor + seconds["memory_passes"], floor + seconds["memory_passes"] + seconds["layers"]
    lost_to = "lost to the loader" if set_by in words.SET_BY else "lost to shared cores"
    limited = f"ceiling, set by\n{words.SET_BY.get(set_by, set_by)}"
    stations: list[
        tuple[str, float | None, str, Rate | None, str]
    ] = [  # loss on the way, rate, its name if it has a bar
        ("", batch / floor, "hardware's limit", None, GREY),
        (GAP["memory_passes"], batch / unfused, "", None, ""),
        (GAP["layers"], batch / layers, "", None, ""),
        (GAP["rest"], step.images_per_second, "step alone", step, SKY),
        (lost_to, report.ceiling.images_per_second, limited, None, ORANGE),
        ("lost in the loop", trained.images_per_second if trained else None, "training achieved", trained, BLUE),
    ]
    labels: list[str] = []
    rate = limit = batch / floor
    for loss, after, name, measured, colour in stations:
        if after is None:
            axes.text(0, len(labels), f" {words.NOT_MEASURED}", va="center", color=GREY)
        elif loss and (name or rate - after > _NOTHING * rate):
            _draw_change(axes, len(labels), rate, after)
            labels.append(loss if after <= rate else "more than that")
        if name and after is not None:
            _draw_level(axes, len(labels), after, measured, colour)
        labels += [name] if name else []
        rate = rate if after is None else after
        limit = max(limit, rate)
    lanes(axes, labels)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.7g}")
    axes.set(xlim=(0, 1.65 * limit), xlabel="images/s, all ranks together (whisker: 95 % confidence)")
    return figure


def _draw_level(axes: Axes, lane: int, rate: float, measured: Rate | None, colour: str) -> None:
    axes.barh(lane, rate, height=0.7, color=colour)
    end = rate
    if measured and measured.interval:
        axes.plot(measured.interval, [lane, lane], color="black", linewidth=1.5, marker="|")
        end = max(rate, measured.interval[1])
    axes.text(end, lane, f"  {words.number(rate)}/s · {words.number(1e3 / rate)} ms/image", va="center", weight="bold")


def _draw_change(axes: Axes, lane: int, before: float, after: float) -> None:
    change = after - before
    if abs(change) < _NOTHING * before:  # rounding
        change = 0.0
    sign, colour = ("−", VERMILION) if change < 0 else ("+", GREEN) if change > 0 else ("", GREY)
    axes.barh(lane, change, left=before, height=0.5, color=colour)
    text = f" {sign}{words.number(abs(change))} ({words.percent(abs(change) / before, 0)})"
    axes.text(max(before, after), lane, text, va="center", color=colour)
    for rate, end in ((before, lane - 0.65), (after, lane + 0.65)):
        axes.plot([rate, rate], [lane, end], color=GREY, linewidth=0.8)


# ---- one step, part by part --------------------------------------------------------------------------------------

_COLOURS = dict(
    zip(
        (*words.PARTS, words.BETWEEN, words.WHOLE),
        (ORANGE, SKY, BLUE, VERMILION, GREEN, PURPLE, "#444444"),
        strict=True,
    )
)


def timeline(report: Report) -> Figure:
    """The mean step of training, as a Gantt chart above the hardware's floors; without images, of the step alone."""
    where = "in training" if report.training_parts else "alone"
    figure = new_figure(4.2, f"The mean step {where}, part by part\n{words.subject(report)}")
    axes, parts = figure.subplots(), _shown_parts(report)
    start = floor_start = 0.0
    for lane, (key, part) in enumerate(parts.items()):
        seconds = part.training if report.training_parts else part.alone
        floors = None if part.floor is None or part.floor_unfused is None else (part.floor, part.floor_unfused)
        if key == words.WHOLE:
            start = floor_start = 0.0
        _draw_lane(axes, lane, _COLOURS[key], start, seconds, floor_start, floors)
        start += seconds or 0
        floor_start += part.floor or 0
    *titles, whole = (part.title for part in parts.values())
    lanes(axes, [*titles, f"{whole}\n{where}"])
    axes.set_xlabel(
        "ms from the start of the step\n(full: measured mean; hatched: hardware's floor, fused; outlined: unfused)"
    )
    axes.set_xlim(0, 1.5 * max(axes.dataLim.x1, 1e-6))  # room for the text
    return figure


def _shown_parts(report: Report) -> dict[str, words.Part]:
    """In training, the exposed all-reduce is in the backward pass, with its floor; without, nobody waits for data."""
    parts = words.parts_of(report)
    if report.training_parts is None:
        del parts["data_wait"]
    elif exposed := parts.pop("all_reduce", None):
        backward = parts["backward"]
        floor = (backward.floor or 0) + (exposed.floor or 0)
        unfused = (backward.floor_unfused or 0) + (exposed.floor_unfused or 0)
        parts["backward"] = backward._replace(title="backward,\nall-reduce", floor=floor, floor_unfused=unfused)
    return parts


def _draw_lane(
    axes: Axes,
    lane: int,
    colour: str,
    start: float,
    seconds: float | None,
    floor_start: float,
    floors: tuple[float, float] | None,
) -> None:
    """A bar for what was measured, one for the floors (fused, unfused), and all in words behind the longer one."""
    said, end = [words.NOT_MEASURED], 0.0
    if seconds is not None:
        axes.barh(lane - 0.13, 1e3 * seconds, left=1e3 * start, height=0.46, color=colour)
        said, end = [f"{words.milliseconds(seconds)} ms"], start + seconds
    if floors:
        outline: dict[str, Any] = {"left": 1e3 * floor_start, "height": 0.24, "facecolor": "white", "edgecolor": GREY}
        for length, hatch in ((floors[1], ""), (floors[0], "/////")):
            if length > 0:  # without a width, its edge would still be a line
                axes.barh(lane + 0.26, 1e3 * length, hatch=hatch, **outline)
        said.append("floor " + "–".join(dict.fromkeys(map(words.milliseconds, floors))))
        end = max(end, floor_start + max(floors))
    axes.annotate(", ".join(said), (1e3 * end, lane - 0.1), (5, 0), textcoords="offset points", va="center")
