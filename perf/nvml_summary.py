"""From one GPU's samples to the figures of a window of time."""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.nvml_readings import READINGS, THROTTLE_BITS

FIELDS = tuple(r.name for r in READINGS if r.name not in ("energy_counter_joules", "throttle_reasons"))
"""The readings that are summed up by their quantiles and kept as curves."""


@dataclass(frozen=True)
class Samples:
    """What was read of one GPU."""

    seconds: Sequence[float]
    """When, in values of time.perf_counter(), ascending."""
    values: dict[str, Sequence[float]]
    """By reading, as long as seconds; NaN where it failed."""

    def known(self, name: str) -> tuple[list[float], list[float]]:
        """Times and values of a reading where it did not fail."""
        pairs = [(t, v) for t, v in zip(self.seconds, self.values[name], strict=True) if not math.isnan(v)]
        return [t for t, _ in pairs], [v for _, v in pairs]

    def between(self, start: float, end: float) -> "Samples":
        """Those taken from start to end, both included."""
        inside = slice(bisect_left(self.seconds, start), bisect_right(self.seconds, end))
        return Samples(self.seconds[inside], {name: values[inside] for name, values in self.values.items()})


def summarise(samples: Samples, reasons: dict[str, str], start: float, end: float) -> dict:
    """What the report says of one GPU between two values of time.perf_counter(), but for its name.

    Quantiles, means and curves are of the samples within; energy is interpolated to the window's ends. reasons: why a reading
    failed, by name. A figure that is not known is None, and "missing" says why.
    """
    energy, source = energy_joules(samples, start, end)
    inside = samples.between(start, end)
    return {
        "energy_joules": energy,
        "energy_source": source,
        "fields": {name: _spread(inside.known(name)[1]) for name in FIELDS},
        "throttled_fraction": _throttled(inside.known("throttle_reasons")[1]),
        "missing": _missing(inside, reasons),
        "series": {
            "seconds": [round(moment - start, 4) for moment in inside.seconds],
            **{name: [None if math.isnan(v) else round(v, 3) for v in inside.values[name]] for name in FIELDS},
        },
    }


def energy_joules(samples: Samples, start: float, end: float) -> tuple[float | None, str | None]:
    """Joules from start to end, and "counter" or "power": where they come from; None, None without either.

    The GPU's own counter where it has one: its difference. Otherwise the integral of power by trapezoids. Both lines are
    interpolated at the window's ends, and end where the samples do: a GPU that was lost used nothing that we know of.
    """
    for name, source in (("energy_counter_joules", "counter"), ("power_watts", "power")):
        moments, values = samples.known(name)
        low, high = (max(start, moments[0]), min(end, moments[-1])) if moments else (0.0, 0.0)
        if low >= high:
            continue
        corners = [low, *(moment for moment in moments if low < moment < high), high]
        heights = [_interpolate(moments, values, moment) for moment in corners]
        if source == "counter":
            return round(heights[-1] - heights[0], 3), source
        steps = zip(pairwise(corners), pairwise(heights), strict=True)
        return round(sum((b - a) * (p + q) / 2 for (a, b), (p, q) in steps), 3), source
    return None, None


def _interpolate(moments: list[float], values: list[float], moment: float) -> float:
    """The value at a moment between the first and the last, on the line between its two neighbours."""
    right = min(bisect_right(moments, moment), len(moments) - 1)
    before, after = moments[right - 1], moments[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (moment - before) / (after - before)


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values
    figures = {
        "median": statistics.median(values),
        "p5": cuts[0],
        "p95": cuts[-1],
        "min": min(values),
        "max": max(values),
        "mean": statistics.fmean(values),
    }
    return {name: round(figure, 3) for name, figure in figures.items()}


def _throttled(reasons: list[float]) -> dict[str, float] | None:
    """Share of the samples in which each reason was set."""
    if not reasons:
        return None
    masks = [int(reason) for reason in reasons]
    return {name: round(sum(mask & bit > 0 for mask in masks) / len(masks), 4) for name, bit in THROTTLE_BITS.items()}


def _missing(inside: Samples, reasons: dict[str, str]) -> dict[str, str]:
    """By reading that was not always there: why, and how often if it was there at times."""
    missing = {}
    for name, values in inside.values.items():
        failed = sum(math.isnan(value) for value in values)
        if failed == len(values):
            missing[name] = reasons.get(name, "no sample in this window")
        elif failed and name in reasons:  # a rate has no first value, and no reason for that
            missing[name] = f"{failed} of {len(values)} readings failed: {reasons[name]}"
    return missing
