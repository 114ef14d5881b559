"""A sampler's report for people."""

_COLUMNS = ("median", "p5", "p95", "min", "max")
_SCALES = {"_bytes_per_second": (1e6, "MB/s"), "_bytes": (2**30, "GiB"), "_percent": (1, "%")}


def table(telemetry: dict) -> list[str]:
    """Lines: each GPU's readings, energy, what lowered its clocks, and what could not be read."""
    lines = [] if telemetry["reason"] is None else [f"GPU telemetry: {telemetry['reason']}"]
    for gpu in telemetry["devices"]:
        lines.append(
            f"GPU {gpu['index']}, {gpu['name']}, {gpu['uuid']}: "
            f"{telemetry['samples']} samples in {telemetry['seconds']:.1f} s, {_energy(gpu)}"
        )
        lines.append(f"  {'':34}" + "".join(f"{column:>11}" for column in _COLUMNS))
        lines += [_row(name, spread) for name, spread in gpu["fields"].items() if spread is not None]
        lines += [
            f"  clock lowered by {reason} in {fraction:.1%} of the samples"
            for reason, fraction in (gpu["throttled_fraction"] or {}).items()
            if fraction > 0
        ]
        lines += [f"  {name}: {reason}" for name, reason in gpu["missing"].items()]
    return lines


def _energy(gpu: dict) -> str:
    joules = gpu["energy_joules"]
    return "energy unknown" if joules is None else f"{joules:,.1f} J by {gpu['energy_source']}"


def _row(name: str, spread: dict[str, float]) -> str:
    for ending, (scale, unit) in _SCALES.items():
        if name.endswith(ending):
            name = f"{name.removesuffix(ending)}, {unit}"
            spread = {column: value / scale for column, value in spread.items()}
    return f"  {name.replace('_', ' '):34}" + "".join(f"{spread[column]:11,.1f}" for column in _COLUMNS)
