"""What training could reach at most, by what was measured of its parts, and why it does not."""

SHARED_CORES = "cores shared by both"
_GOOD, _IMPOSSIBLE = 0.97, 1.03  # of the ceiling


def ceiling(stages: dict, training_parts: dict | None, *, batch_size: int, ranks: int, cores_per_rank: float) -> dict:
    """The CEILING of a report. cores_per_rank: those of a machine, divided by its ranks.

    Loader and step work at the same time, so that a step takes as long as the slower of them, on the slowest rank; or, where
    they share cores, as long as the cores need for the processor time of both. If each of them keeps all cores busy, that is
    1 / (1 / loader + 1 / step) images per second.
    """
    share = batch_size / ranks
    seconds = {
        name: share / stages[name]["images_per_second_per_rank"]
        for name in ("loader", "step")
        if stages[name] is not None
    }
    if stages["loader"] is not None:
        cpu_seconds = stages["loader"]["cpu_seconds_per_step"] + stages["step"]["cpu_seconds_per_step"]
        seconds[SHARED_CORES] = cpu_seconds / cores_per_rank
    set_by = max(seconds, key=lambda name: seconds[name])
    rate = batch_size / seconds[set_by]
    training = stages["training"]
    ratio = training["images_per_second"]["median"] / rate if training else None
    return {
        "images_per_second": rate,
        "set_by": set_by,
        "training_over_ceiling": ratio,
        "why_not": _why_not(ratio, set_by, seconds, stages, training_parts) if training else None,
    }


def _why_not(
    ratio: float | None, set_by: str, seconds: dict[str, float], stages: dict, training_parts: dict | None
) -> str | None:
    """Why training is below its ceiling, or above it; None where it is near enough."""
    assert ratio
    others_before, others = (stages[name]["cores_of_others"] for name in ("step", "training"))
    if ratio > _IMPOSSIBLE:
        return (
            "the ceiling is too low, since loader and step were measured at another speed of the machine: other programs "
            f"kept {others_before:.1f} cores busy beside the step alone, {others:.1f} in training"
        )
    if ratio >= _GOOD:
        return None
    assert training_parts
    wait, work = training_parts["data_wait"]["median"], training_parts["step"]["median"]
    alone = stages["step"]["seconds_per_step"]["median"]
    reasons = [f"a step of training takes {_ms(wait + work)} where the ceiling has {_ms(seconds[set_by])}"]
    if wait > 0.01 * work:
        reasons.append(f"{_ms(wait)} of it it waits for images")
    if work > 1.01 * alone:
        beside = ", beside the loader's threads on the same cores" if set_by == SHARED_CORES else ""
        reasons.append(f"its own work takes {_ms(work)} instead of {_ms(alone)} alone{beside}")
    if others > 0.1:
        reasons.append(f"other programs kept {others:.1f} cores busy meanwhile, {others_before:.1f} before")
    return "; ".join(reasons)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
