"""The shape of report.json, as far as the report shows it, and reading one.

profile/throughput.py writes the file. Any value in it may be null: not measured. A key that is missing, or a value of another
kind, means that this is not such a file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError

PROGRAM, FORMAT = "throughput", 1
_LARGEST = 1e30

# float: a finite number; object: anything; [shape]: a list; {str: shape}: any names, each with such a value;
# {OPTIONAL: {name: shape}}: names that may be missing.
OPTIONAL = object()
_SUMMARY = dict.fromkeys(("median", "p5", "p95", "count", "relative_ci"), float)
_RATE = {
    "images_per_second": _SUMMARY,
    "images_per_second_per_rank": float,
    "seconds_per_step": _SUMMARY,
    "stopped_by": str,
}
# A curve has null where a reading failed; no other list has.
_CURVE, _SPAN = [float], [float]
_SERIES = {"seconds": [float], str: _CURVE}
_DEVICE = {
    "index": float,
    "name": str,
    "energy_joules": float,
    "fields": {str: {"median": float, "p5": float, "p95": float}},
    "throttled_fraction": {str: float},
    "missing": {str: str},
    "series": _SERIES,
}
_SHAPE: dict = {
    "created": str,
    "git_revision": str,
    "hardware": {"device": str, "name": str, "ranks": float, str: object},
    "config": {"arch": str, "data": str, "batch_size": float, str: object},
    "warm_up": dict.fromkeys(("steps", "seconds", "compile_seconds", "first_batch_seconds"), float),
    "stages": dict.fromkeys(("reading", "decoding", "loader", "step", "training"), _RATE),
    "step_parts": dict.fromkeys(("forward", "backward", "all_reduce", "optimizer"), _SUMMARY),
    "training_parts": {"data_wait": _SUMMARY, "step": _SUMMARY},
    "ceiling": {"images_per_second": float, "set_by": str, "training_over_ceiling": float, "why_not": str},
    "roofline": {
        "peaks": {"name": str, "source": str, "flops_per_second": float, "bytes_per_second": float},
        "floor_seconds": dict.fromkeys(("forward", "backward", "optimizer", "all_reduce", "total"), float),
        "mfu": float,
        "images_per_joule": float,
        "layers": [{"name": str, "kind": str, "flops": float, "bytes": float, "floor_seconds": float}],
        "scaling": [
            {
                "ranks": float,
                "images_per_second": float,
                "images_per_second_compressed": float,
                OPTIONAL: dict.fromkeys(("efficiency", "efficiency_compressed"), float),
            }
        ],
    },
    "telemetry": {
        "available": bool,
        "reason": str,
        "devices": [_DEVICE],
        "stages": {str: [_DEVICE]},
        OPTIONAL: {"stage_seconds": {str: _SPAN}},
    },
    "verdict": {
        "bound": str,
        "sentence": str,
        "evidence": [{"name": str, "value": float, "unit": str}],
        "try": [{"flags": str, "why": str}],
    },
}
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", float: "a finite number"}


def read_report(path: Path) -> dict:
    """The report in a file. Raises UserError: no such file, not JSON, not a report, another format."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON; give the report.json that profile/throughput.py wrote") from error
    check_report(report, str(path))
    return report


def check_report(report: Any, name: str) -> None:
    """Raises UserError, with the name in front, where something is not a report that this program can show."""
    if not isinstance(report, dict) or report.get("program") != PROGRAM:
        raise UserError(f"{name}: not a report; give the report.json that profile/throughput.py wrote")
    if report.get("format") != FORMAT:
        raise UserError(
            f"{name}: a report of format {report.get('format')}, and this program reads format {FORMAT}; "
            "show it with the revision that wrote it"
        )
    problem = next(_problems(report, _SHAPE, ""), None)
    if problem:
        raise UserError(f"{name}: not a whole report: {problem}; measure again with profile/throughput.py")


def find(report: dict, path: str) -> Any:
    """The value at a path such as "stages.step.seconds_per_step.median"; None where it, or anything above it, is null."""
    value: Any = report
    for key in path.split("."):
        if value is None:
            return None
        value = value[key]
    return value


def _problems(value: Any, shape: Any, where: str) -> Iterator[str]:
    if value is None or shape is object:
        return
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not _is_a(value, kind):
        yield f"{where} is not {_KINDS[kind]}"
    elif kind is dict:
        for key, inner in shape.items():
            if key is str:
                for name in value.keys() - shape.keys():
                    yield from _problems(value[name], inner, _below(where, name))
            elif key is OPTIONAL:
                for name in inner.keys() & value.keys():
                    yield from _problems(value[name], inner[name], _below(where, name))
            elif key not in value:
                yield f"{_below(where, key)} is missing"
            else:
                yield from _problems(value[key], inner, _below(where, key))
        if shape is _SERIES and len({len(each) for each in value.values() if each is not None}) > 1:
            yield f"{where} has lists of several lengths"
    elif kind is list:
        if shape is _SPAN and len(value) != 2:
            yield f"{where} is not a first and a last second"
        for number, item in enumerate(value):
            if item is None and shape is not _CURVE:
                yield f"{where}[{number}] is null"
            yield from _problems(item, shape[0], f"{where}[{number}]")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, kind)


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
