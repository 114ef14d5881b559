"""From one GPU's samples to the figures of a window of time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.nvml.readings import THROTTLE_BITS

Samples = Mapping[str, np.ndarray]
"""By reading, NaN where it failed; and "seconds", ascending values of time.perf_counter(). All float64, of one length."""
_NOT_FIELDS = ("seconds", "energy_counter_joules", "throttle_reasons")


def summarise(samples: Samples, reasons: Mapping[str, str], start: float, end: float) -> tuple[int, dict[str, Any]]:
    """The number of samples from start to end, both included, and what the report says of them.

    Quantiles, means and curves are of the samples within; energy is interpolated to the window's ends. reasons: why a reading
    failed, by name. A figure that is not known is None, and "missing" says why.
    """
    within = (samples["seconds"] >= start) & (samples["seconds"] <= end)
    inside = {name: values[within] for name, values in samples.items()}
    known = {name: values[~np.isnan(values)] for name, values in inside.items()}
    seconds, masks = inside.pop("seconds"), known["throttle_reasons"].astype(np.int64)
    energy, source = energy_joules(samples, start, end)
    missing = {}
    for name in inside:
        failed = len(seconds) - len(known[name])
        if failed == len(seconds):
            missing[name] = reasons.get(name, "no sample in this window")
        elif failed and name in reasons:  # a rate has no first value, and no reason for that
            missing[name] = f"{failed} of {len(seconds)} readings failed: {reasons[name]}"
    fields = [name for name in inside if name not in _NOT_FIELDS]
    shares = (
        {name: round(float(np.mean(masks & bit > 0)), 4) for name, bit in THROTTLE_BITS.items()} if len(masks) else None
    )
    return len(seconds), {
        "energy_joules": energy,
        "energy_source": source,
        "fields": {name: _spread(known[name]) for name in fields},
        "throttled_fraction": shares,
        "missing": missing,
        "series": {
            "seconds": np.round(seconds - start, 4).tolist(),
            **{name: [rounded(value) for value in inside[name].tolist()] for name in fields},
        },
    }


def energy_joules(samples: Samples, start: float, end: float) -> tuple[float | None, str | None]:
    """Joules from start to end, and "counter" or "power": where they come from; None, None without either.

    The GPU's own counter where it has one: its difference. Otherwise the integral of power by trapezoids. Both lines are
    interpolated at the window's ends, and end where the samples do: a GPU that was lost used nothing that we know of.
    """
    for name, source in (("energy_counter_joules", "counter"), ("power_watts", "power")):
        there = ~np.isnan(samples[name])
        moments, values = samples["seconds"][there], samples[name][there]
        low, high = (max(start, moments[0]), min(end, moments[-1])) if len(moments) else (0.0, 0.0)
        if low >= high:
            continue
        corners = np.array([low, *moments[(moments > low) & (moments < high)], high])
        heights = np.interp(corners, moments, values)
        integral = np.sum(np.diff(corners) * (heights[1:] + heights[:-1])) / 2
        return rounded(heights[-1] - heights[0] if source == "counter" else integral), source
    return None, None


def _spread(values: np.ndarray) -> dict[str, float | None] | None:
    if not len(values):
        return None
    figures = zip(("min", "p5", "median", "p95", "max"), np.quantile(values, (0, 0.05, 0.5, 0.95, 1)), strict=True)
    return {name: rounded(figure) for name, figure in (*figures, ("mean", values.mean()))}


def rounded(value: float) -> float | None:
    """To three digits behind the point; None for NaN."""
    return None if np.isnan(value) else round(float(value), 3)
