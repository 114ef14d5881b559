"""From one GPU's samples to the figures of a window of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.nvml.readings import THROTTLE_BITS

_NOT_FIELDS = ("energy_counter_joules", "throttle_reasons")


@dataclass(frozen=True)
class Samples:
    """What was read of one GPU."""

    seconds: np.ndarray  # when, in values of time.perf_counter(), ascending
    values: dict[str, np.ndarray]  # by reading, as long as seconds; NaN where it failed

    @classmethod
    def of(cls, seconds: Sequence[float], values: Mapping[str, Sequence[float]]) -> Samples:
        return cls(np.array(seconds), {name: np.array(each) for name, each in values.items()})

    def known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Times and values of a reading where it did not fail."""
        values = self.values[name]
        there = ~np.isnan(values)
        return self.seconds[there], values[there]

    def between(self, start: float, end: float) -> Samples:
        """Those taken from start to end, both included."""
        inside = slice(np.searchsorted(self.seconds, start), np.searchsorted(self.seconds, end, side="right"))
        return Samples(self.seconds[inside], {name: values[inside] for name, values in self.values.items()})


def summarise(samples: Samples, reasons: Mapping[str, str], start: float, end: float) -> tuple[int, dict[str, Any]]:
    """The number of samples between two values of time.perf_counter(), and what the report says of them.

    Quantiles, means and curves are of the samples within; energy is interpolated to the window's ends. reasons: why a reading
    failed, by name. A figure that is not known is None, and "missing" says why.
    """
    energy, source = energy_joules(samples, start, end)
    inside = samples.between(start, end)
    fields = [name for name in samples.values if name not in _NOT_FIELDS]
    throttled, masks = None, inside.known("throttle_reasons")[1].astype(np.int64)
    if len(masks):
        throttled = {name: round(float(np.mean(masks & bit > 0)), 4) for name, bit in THROTTLE_BITS.items()}
    missing = {}
    for name, values in inside.values.items():
        failed = int(np.isnan(values).sum())
        if failed == len(values):
            missing[name] = reasons.get(name, "no sample in this window")
        elif failed and name in reasons:  # a rate has no first value, and no reason for that
            missing[name] = f"{failed} of {len(values)} readings failed: {reasons[name]}"
    return len(inside.seconds), {
        "energy_joules": energy,
        "energy_source": source,
        "fields": {name: _spread(inside.known(name)[1]) for name in fields},
        "throttled_fraction": throttled,
        "missing": missing,
        "series": {
            "seconds": np.round(inside.seconds - start, 4).tolist(),
            **{name: [rounded(value) for value in inside.values[name].tolist()] for name in fields},
        },
    }


def energy_joules(samples: Samples, start: float, end: float) -> tuple[float | None, str | None]:
    """Joules from start to end, and "counter" or "power": where they come from; None, None without either.

    The GPU's own counter where it has one: its difference. Otherwise the integral of power by trapezoids. Both lines are
    interpolated at the window's ends, and end where the samples do: a GPU that was lost used nothing that we know of.
    """
    for name, source in (("energy_counter_joules", "counter"), ("power_watts", "power")):
        moments, values = samples.known(name)
        low, high = (max(start, moments[0]), min(end, moments[-1])) if len(moments) else (0.0, 0.0)
        if low >= high:
            continue
        corners = np.array([low, *moments[(moments > low) & (moments < high)], high])
        heights = np.interp(corners, moments, values)
        if source == "counter":
            return rounded(heights[-1] - heights[0]), source
        return rounded(np.sum(np.diff(corners) * (heights[1:] + heights[:-1])) / 2), source
    return None, None


def _spread(values: np.ndarray) -> dict[str, float | None] | None:
    if not len(values):
        return None
    p5, median, p95 = np.quantile(values, (0.05, 0.5, 0.95))
    figures = {"median": median, "p5": p5, "p95": p95, "min": values.min(), "max": values.max(), "mean": values.mean()}
    return {name: rounded(figure) for name, figure in figures.items()}


def rounded(value: float) -> float | None:
    """To three digits behind the point; None for NaN."""
    return None if np.isnan(value) else round(float(value), 3)
