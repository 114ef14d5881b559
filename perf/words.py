"""Numbers, sentences and tables of a report in words: the same on the terminal, on the page and in the pictures."""

import math
from typing import Any, NamedTuple

import rich.table
from rich.console import Console
from rich.text import Text

from common.process import visible
from common.progress import printable
from perf.report import STAGES as STAGE_NAMES
from perf.report import FloorSeconds, Rate, Report, Summary

NOT_MEASURED = "not measured"

STAGES = {name: name if name == "training" else f"{name} alone" for name in STAGE_NAMES}
PARTS = {
    "data_wait": "data wait",
    "forward": "forward",
    "backward": "backward",
    "all_reduce": "all-reduce, exposed",
    "optimizer": "optimizer",
}
BETWEEN, WHOLE = "between", "whole"
SET_BY = {"loader": "the loader", "step": "the step"}
_STOPPED_BY = {
    "precision": "the wanted precision was reached",
    "time": "the time was up before the wanted precision was reached",
    "steps": "the steps were used up before the wanted precision was reached",
}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_TABLE_WIDTH = 110
SLOW = 2.0
"""Times the median: a lap that takes longer is a slow one."""
SLOW_STEPS = "Slow steps are those that took over twice the median of their stage."

Table = list[dict[str, str]]
"""Rows, each from column to cell; a cell that is left out is empty. cells() puts them in order."""


# ---- numbers -----------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """At least three significant digits, thousands apart: 0.0123, 4.56, 78.9, 1,234. A count stays whole."""
    if value is None:
        return NOT_MEASURED
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:,.{max(0, decimals)}f}" if decimals < 9 else f"{value:.2e}"


def with_prefix(value: float | None, unit: str) -> str:
    """With three significant digits and an SI prefix: 989 TFLOP/s."""
    if value is None:
        return NOT_MEASURED
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1e3, power + 1
    return f"{number(value)} {_PREFIXES[power]}{unit}"


def percent(fraction: float | None, digits: int = 1) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.{digits}f} %"


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)


def duration(seconds: float | None) -> str:
    """In the two largest units: 12.3 s, 4 min 7 s, 5 h 4 min, 3 d 2 h."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 59.5:
        return f"{number(float(seconds))} s"
    whole, minutes, hours = (round(seconds / unit) for unit in (1, 60, 3600))
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 1440 else f"{hours // 24:,} d {hours % 24} h"


def gib(size: float) -> str:
    return f"{number(size / 2**30)} GiB"


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is not measured, or nothing can be divided by."""
    return None if numerator is None or not denominator else numerator / denominator


def spread_of(summary: Summary | None) -> str:
    """p5–p95, of seconds, in milliseconds."""
    return NOT_MEASURED if summary is None else f"{milliseconds(summary.p5)}–{milliseconds(summary.p95)}"


def interval_of(rate: Rate) -> str:
    return "too few steps" if rate.interval is None else "–".join(number(float(end)) for end in rate.interval)


def text_of(value: Any) -> str:
    """A value of the configuration or the hardware on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else printable(str(value))


def name_of(key: str) -> str:
    """images_per_second → images per second"""
    return printable(key).replace("_", " ")


def reading(field: str) -> tuple[str, float]:
    """What a reading of NVML is called, with the unit it is shown in, and the factor to that unit from the one it is kept in."""
    for ending, unit, factor in (
        ("_bytes_per_second", "GB/s", 1e-9),
        ("_bytes", "GiB", 2**-30),
        ("_percent", "%", 1.0),
    ):
        if field.endswith(ending):
            return f"{name_of(field.removesuffix(ending))}, {unit}", factor
    return name_of(field), 1.0


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header, and a list for each row."""
    header = list(dict.fromkeys(name for row in table for name in row))
    return header, [[row.get(name, "") for name in header] for row in table]


def print_table(table: Table, title: str = "") -> None:
    """At its full width: on a narrower terminal, which breaks its lines, no column is lost."""
    header, lines = cells(table)
    shown = rich.table.Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for place, name in enumerate(header):
        last = 0 < place == len(header) - 1
        shown.add_column(Text(name), justify="right" if place else "left", no_wrap=not last)
    for line in lines:
        shown.add_row(*(Text(visible(cell)) for cell in line))
    Console(width=max(Console().width, _TABLE_WIDTH)).print(shown)


# ---- what a reader asks first ------------------------------------------------------------------------------------


def subject(report: Report) -> str:
    """What was measured, on one line."""
    config, hardware = report.config, report.hardware
    machines = f", {hardware.machines} machines" if hardware.machines > 1 else ""
    return (
        f"{config.get('arch')} on {config.get('data')}, {hardware.ranks} × {hardware.name}{machines}, "
        f"batch {config.get('batch_size')}, {config.get('precision')}"
    )


def headline_rate(report: Report) -> Rate:
    """The answer to how fast: training's rate, or the step's where there are no images."""
    return report.stages.training or report.stages.step


def speed_sentence(report: Report) -> str:
    """What stands behind the headline's images/s."""
    rate, where = headline_rate(report), "in training" if report.stages.training else "in the step alone"
    known = f"; 95 % confidence: {interval_of(rate)}" if rate.interval else ""
    return f"{where}{known}. A step takes {milliseconds(rate.step_seconds.mean)} ms on average."


def surety(report: Report) -> str:
    """Half the width of the headline's interval, relative to it."""
    within = headline_rate(report).relative_ci
    return "unknown" if within is None else f"± {percent(within)}"


def surety_sentence(report: Report) -> str:
    """From what the headline's figure is, what ended the measuring, and how much of it were slow steps."""
    rate = headline_rate(report)
    known = "95 % confidence" if rate.interval else "too few for a confidence interval"
    why = _STOPPED_BY.get(rate.stopped_by, rate.stopped_by)
    words = f"{_steps(report, rate):,} steps in {duration(rate.seconds)}, {known}; {why}."
    slow, share = slow_laps(rate)
    laps = "steps" if rate.steps_a_lap == 1 else f"laps of {rate.steps_a_lap} steps"
    return words + (
        f" Of the {laps}, {slow:,} took over twice the median: {percent(share)} of the time." if slow else ""
    )


def slow_laps(rate: Rate) -> tuple[int, float]:
    """How many laps of the series took more than twice the median, and their share of all the time.

    A slow value of a long series is the longest step of several, so what counts is the time that the others leave.
    """
    others = [seconds for seconds in rate.series_seconds if seconds <= SLOW * rate.step_seconds.median]
    slow = len(rate.series_seconds) - len(others)
    return slow, max(0.0, 1 - sum(others) * rate.steps_a_lap / rate.seconds) if slow else 0.0


def _steps(report: Report, rate: Rate) -> int:
    return round(rate.images / report.config["batch_size"])


def verdict_evidence(report: Report) -> list[tuple[str, str]]:
    """(name, value with its unit) of each figure that shows the verdict."""
    return [(figure.name, f"{number(figure.value)} {figure.unit}".strip()) for figure in report.verdict.evidence]


def ceiling_sentence(report: Report) -> str:
    """How near training came to its ceiling, and why not nearer."""
    ceiling = report.ceiling
    return (
        f"The ceiling is {number(ceiling.images_per_second)} images/s, set by "
        f"{SET_BY.get(ceiling.set_by, ceiling.set_by)}; training over ceiling: {percent(ceiling.training_over_ceiling)}."
        + (f" Why not more: {ceiling.why_not.rstrip('.')}." if ceiling.why_not else "")
    )


def warm_up_sentence(report: Report) -> str:
    """What the figures leave out."""
    warm_up = report.warm_up
    parts = {"compiling": warm_up.compile_seconds, "the first batch": warm_up.first_batch_seconds}
    others = "".join(f", {name} {number(seconds)} s" for name, seconds in parts.items() if seconds is not None)
    return f"Left out of every figure: {number(warm_up.steps)} steps of warm-up in {number(warm_up.seconds)} s{others}."


def memory_sentence(report: Report) -> str:
    memory = report.memory
    if memory is None:
        return f"Peak memory of the device: {NOT_MEASURED}."
    room = memory.total_bytes - memory.peak_bytes
    return (
        f"Peak memory of the device: {gib(memory.peak_bytes)} of {gib(memory.total_bytes)}, "
        f"head room {gib(room)} ({percent(room / memory.total_bytes, 0)})."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def stage_table(report: Report) -> Table:
    """Images per second of each stage, all ranks together, with its interval; milliseconds a step; and its slow steps."""
    table = []
    for key, title in STAGES.items():
        rate: Rate | None = getattr(report.stages, key)
        if rate is None:
            table.append({"stage": title, "images/s": NOT_MEASURED})
            continue
        row = {"stage": title, "images/s": number(rate.images_per_second), "95 % interval": interval_of(rate)}
        if report.hardware.ranks > 1:
            row["slowest rank"] = f"{number(min(rate.images_per_second_per_rank))} (rank {rate.slowest_rank})"
        slow, share = slow_laps(rate)
        laps = "" if rate.steps_a_lap == 1 else f" laps of {rate.steps_a_lap}"
        row |= {
            "ms a step": milliseconds(rate.step_seconds.mean),
            "p5–p95": spread_of(rate.step_seconds),
            "slow steps": f"{slow:,}{laps}, {percent(share, 0)} of the time" if slow else "none",
            "steps": number(_steps(report, rate)) + ("" if rate.stopped_by == "precision" else f" ({rate.stopped_by})"),
        }
        table.append(row)
    return table


class Part(NamedTuple):
    """Of a step, mean seconds; None: not measured, or there is no such thing."""

    title: str
    training: float | None
    alone: float | None = None
    floor: float | None = None
    floor_unfused: float | None = None
    spread: Summary | None = None  # in training


def parts_of(report: Report) -> dict[str, Part]:
    """PARTS in order, then BETWEEN them, if there was training, and the WHOLE step. The all-reduce is not there for one rank; in
    training, backward has what is exposed of it."""
    alone, training, roofline = report.step_parts, report.training_parts, report.roofline
    fused, unfused = (_floors_of_parts(floor) for floor in (roofline.floor_seconds, roofline.floor_seconds_unfused))
    parts = {}
    for key, title in PARTS.items():
        if key != "all_reduce" or report.hardware.ranks > 1:
            spread, single = getattr(training, key, None), getattr(alone, key, None)
            trained, by_itself = (summary and summary.mean for summary in (spread, single))
            parts[key] = Part(title, trained, by_itself, fused.get(key), unfused.get(key), spread)
    whole = None
    if training:
        between = training.step.mean - training.forward.mean - training.backward.mean - training.optimizer.mean
        parts[BETWEEN] = Part("between these", max(0.0, between))
        whole = training.data_wait.mean + training.step.mean
    floors = roofline.floor_seconds.total, roofline.floor_seconds_unfused.total
    return {**parts, WHOLE: Part("whole step", whole, report.stages.step.step_seconds.mean, *floors)}


def _floors_of_parts(floor: FloorSeconds) -> dict[str, float]:
    """Of the all-reduce, what the backward pass cannot hide."""
    parts = {name: getattr(floor, name) for name in ("forward", "backward", "optimizer")}
    return {**parts, "all_reduce": min(max(0.0, floor.total - sum(parts.values())), floor.all_reduce)}


def part_table(report: Report) -> Table:
    """What a step consists of in training and by itself, and the hardware's floor for each part."""
    table = []
    for key, part in parts_of(report).items():
        row = {"part of a step, ms": part.title, "in training": milliseconds(part.training)}
        if key not in (BETWEEN, WHOLE):
            row["p5–p95"] = spread_of(part.spread)
        if report.training_parts and key == "all_reduce":
            row |= {"in training": "in backward", "p5–p95": ""}
        if key not in ("data_wait", BETWEEN):
            floors = {"floor, fused": milliseconds(part.floor), "floor, unfused": milliseconds(part.floor_unfused)}
            row |= {"step alone": milliseconds(part.alone), **floors}
        table.append(row)
    return table
