"""Numbers and names of a report in words: the same on the terminal, on the page and in the pictures."""

import math
from typing import Any

from common.progress import printable
from perf.report_format import find

NOT_MEASURED = "not measured"

STAGES = {
    "reading": "reading alone",
    "decoding": "decoding alone",
    "loader": "loader alone",
    "step": "step alone",
    "training": "training",
}
PARTS = {
    "data_wait": "data wait",
    "forward": "forward",
    "backward": "backward",
    "all_reduce": "all-reduce, exposed",
    "optimizer": "optimizer",
}
_STOPPED_BY = {"time": " (time)", "steps": " (steps)"}
SET_BY = {"loader": "the loader", "step": "the step"}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


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


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is not measured, or nothing can be divided by."""
    return None if numerator is None or not denominator else numerator / denominator


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


def spread_of(summary: dict | None, scale: float = 1.0) -> str:
    """p5–p95"""
    if summary is None or summary["p5"] is None or summary["p95"] is None:
        return NOT_MEASURED
    return f"{number(scale * summary['p5'])}–{number(scale * summary['p95'])}"


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)


def verdict_sentence(report: dict) -> str:
    return printable(find(report, "verdict.sentence") or "There is no verdict on this run.")


def verdict_evidence(report: dict) -> list[tuple[str, str]]:
    """(name, value with its unit) of each figure that shows the verdict."""
    return [
        (text_of(figure["name"]), printable(f"{number(figure['value'])} {figure['unit'] or ''}".strip()))
        for figure in find(report, "verdict.evidence") or []
    ]


def flags_to_try(report: dict) -> list[tuple[str, str]]:
    """(flags, why), in order."""
    return [(text_of(each["flags"]), text_of(each["why"])) for each in find(report, "verdict.try") or []]


def subject(report: dict) -> str:
    """What was measured, on one line."""
    config, hardware = report["config"] or {}, report["hardware"] or {}
    parts = [f"{config.get('arch')} on {config.get('data')}", f"{hardware.get('ranks')} × {hardware.get('name')}"]
    parts += [f"batch {config.get('batch_size')}", str(config.get("precision"))]
    return printable(", ".join(parts))


def ceiling_sentence(report: dict) -> str:
    """How near training came to its ceiling, and why not nearer."""
    ceiling = report["ceiling"]
    if ceiling is None or ceiling["images_per_second"] is None:
        return "The ceiling of training was not measured."
    set_by = SET_BY.get(ceiling["set_by"], ceiling["set_by"])
    words = [
        f"The ceiling is {number(ceiling['images_per_second'])} images/s, set by {set_by}; "
        f"training over ceiling: {percent(ceiling['training_over_ceiling'])}."
    ]
    if ceiling["why_not"]:
        words.append(f"Why not more: {ceiling['why_not'].rstrip('.')}.")
    return printable(" ".join(words))


def warm_up_sentence(report: dict) -> str:
    """What the figures leave out."""
    warm_up = report["warm_up"]
    if warm_up is None:
        return "What was left out as warm-up is not known."
    parts = [f"{number(warm_up['steps'])} steps of warm-up in {number(warm_up['seconds'])} s"]
    parts += [
        f"{name} {number(warm_up[key])} s"
        for name, key in (("compiling", "compile_seconds"), ("the first batch", "first_batch_seconds"))
        if warm_up[key] is not None
    ]
    return f"Left out of every figure: {', '.join(parts)}."


def stage_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: images per second and milliseconds a step of each stage.

    The last column is the confidence interval of the median, and what ended the measuring, if that did not.
    """
    per_rank = ["per rank"] if find(report, "hardware.ranks") != 1 else []
    header = ["stage", "images/s", "p5–p95", *per_rank, "ms a step", "steps", "median ±"]
    rows = []
    for key, title in STAGES.items():
        stage = find(report, f"stages.{key}")
        if stage is None:
            rows.append([title, NOT_MEASURED, *[""] * (len(header) - 2)])
            continue
        rate, step = stage["images_per_second"] or {}, stage["seconds_per_step"] or {}
        within = rate.get("relative_ci")
        rows.append(
            [
                title,
                number(rate.get("median")),
                spread_of(stage["images_per_second"]),
                *([number(stage["images_per_second_per_rank"])] if per_rank else []),
                milliseconds(step.get("median")),
                number(step.get("count")),
                NOT_MEASURED if within is None else percent(within) + _STOPPED_BY.get(stage["stopped_by"], ""),
            ]
        )
    return header, rows


def part_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a step consists of, and the hardware's floor for each part."""
    header = ["part of a step", "ms", "p5–p95", "floor, ms"]
    rows, floors = [], floors_of_parts(report)
    for key, title in parts_of(report).items():
        summary = part_summary(report, key)
        floor = "" if key == "data_wait" else milliseconds(floors[key])
        rows.append([title, milliseconds((summary or {}).get("median")), spread_of(summary, 1e3), floor])
    return header, rows


def parts_of(report: dict) -> dict[str, str]:
    """PARTS, less the all-reduce where there is but one rank."""
    return {key: title for key, title in PARTS.items() if key != "all_reduce" or find(report, "hardware.ranks") != 1}


def part_summary(report: dict, part: str) -> dict | None:
    """The seconds of one of PARTS."""
    return find(report, f"training_parts.{part}" if part == "data_wait" else f"step_parts.{part}")


def floors_of_parts(report: dict) -> dict[str, float | None]:
    """The least seconds of each of PARTS but the data wait; of the all-reduce, of what the backward pass cannot hide."""
    floors = find(report, "roofline.floor_seconds") or {}
    computing = {part: floors.get(part) for part in ("forward", "backward")}
    others, total = [*computing.values(), floors.get("optimizer")], floors.get("total")
    known = [seconds for seconds in others if seconds is not None]
    exposed = floors.get("all_reduce")
    if exposed is not None and total is not None and len(known) == len(others):
        exposed = min(exposed, max(0.0, total - sum(known)))
    return {**computing, "all_reduce": exposed, "optimizer": floors.get("optimizer")}
