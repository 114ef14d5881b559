"""The ceiling of training, and the verdict: what limits a run, as far as the figures say, and how sure that is.

perf/bottlenecks.py has the questions. The verdict is "inconclusive" where training was faster than its parts allow, or where
another answer would be given elsewhere within what is known of the rates: their intervals, and the cores that other programs
took meanwhile. What is known to ±5 % and better is known well enough: then it is a close call, and said to be one.
"""

from itertools import product
from statistics import median

from perf.advice import SHARED_CORES, for_the_step, on_gpu
from perf.bottlenecks import Finding, Scale, answer, floor_of_passes, ms, passes_seconds, throttled, wait_share
from perf.report import Ceiling, Figure, Rate, Report, Stages, TrainingParts, Verdict

NO_VERDICT = Verdict(bound="inconclusive", sentence="Not judged yet.", evidence=[], tries=[], cautions=[])

_GOOD, _IMPOSSIBLE = 0.97, 1.03  # training, of its ceiling
_SURE = 0.05  # half of what a rate may vary by, of the rate
_FEW_STEPS = 2.0  # a rate of so few steps that it has no interval may be wrong by this factor
_MANY_OTHERS = 0.1  # of the cores
_SLOW_RANK = 0.05  # below the median rank
_SLOWER = ": the machine was slower when those were measured"
_DECISIVE = ("loader", "step", "training")  # the stages that a verdict hangs on


def ceiling(
    stages: Stages, training_parts: TrainingParts | None, *, batch_size: int, ranks: int, cores_per_rank: float
) -> Ceiling:
    """What training could reach at most. cores_per_rank: those of a machine, divided by its ranks.

    Loader and step work at the same time, so that a step takes as long as the slower of them, on the slowest rank; or, where
    they share cores, as long as the cores need for the processor time of both. If each of them keeps all cores busy, that is
    1 / (1 / loader + 1 / step) images per second.
    """
    slowest = {"step": min(stages.step.images_per_second_per_rank)}
    if stages.loader:
        slowest["loader"] = min(stages.loader.images_per_second_per_rank)
    seconds = {name: batch_size / ranks / rate for name, rate in slowest.items()}
    if stages.loader:
        seconds[SHARED_CORES] = (stages.loader.cpu_seconds_per_step + stages.step.cpu_seconds_per_step) / cores_per_rank
    set_by = max(seconds, key=lambda name: seconds[name])
    rate = batch_size / seconds[set_by]
    ratio = stages.training.images_per_second / rate if stages.training else None
    return Ceiling(
        images_per_second=rate,
        set_by=set_by,
        training_over_ceiling=ratio,
        why_not=_why_not(ratio, set_by, seconds[set_by], stages, training_parts) if ratio else None,
    )


def _why_not(
    ratio: float, set_by: str, seconds: float, stages: Stages, training_parts: TrainingParts | None
) -> str | None:
    """Why training is below its ceiling, or above it; None where it is near enough. seconds: of a step, by the ceiling."""
    assert stages.training
    others_before, others = stages.step.cores_of_others, stages.training.cores_of_others
    if ratio > _IMPOSSIBLE:
        return (
            "the ceiling is too low, since loader and step were measured at another speed of the machine: other programs "
            f"kept {others_before:.1f} cores busy beside the step alone, {others:.1f} in training"
        )
    if ratio >= _GOOD or not training_parts:
        return None
    wait, work, alone = training_parts.data_wait.mean, training_parts.step.mean, stages.step.step_seconds.mean
    reasons = [f"a step of training takes {ms(wait + work)} where the ceiling has {ms(seconds)}"]
    if wait > 0.01 * work:
        reasons.append(f"{ms(wait)} of it it waits for images")
    if work > 1.01 * alone:
        beside = ", beside the loader's threads on the same cores" if set_by == SHARED_CORES else ""
        reasons.append(f"its own work takes {ms(work)} instead of {ms(alone)} alone{beside}")
    if others > 0.1:
        reasons.append(f"other programs kept {others:.1f} cores busy meanwhile, {others_before:.1f} before")
    return "; ".join(reasons)


def judge(report: Report) -> Verdict:
    """The verdict, by all else that is in the report.

    A GPU that is held down comes first: NVML says so, whatever the rates are, and it may be why they vary.
    """
    why, ratio, limit = _excess(report), report.ceiling.training_over_ceiling, report.ceiling.images_per_second
    cautions, finding = _cautions(report, slower_before=why == _SLOWER), throttled(report)
    if not finding and ratio and why:
        finding = _inconclusive(
            f"training makes {ratio:.2f} times the images that loader and step by themselves allow{why}.",
            [("training", ratio * limit, "images/s"), ("its ceiling", limit, "images/s")],
        )
    if not finding:
        finding = answer(report, Scale())
        wide, narrow = (_other_answers(report, finding.bound, narrow_too=narrow_too) for narrow_too in (False, True))
        either = " or ".join([finding.bound, *sorted(wide or narrow)])
        if wide:
            cautions = cautions or ["The rates are not known well enough: measure again, for more --seconds."]
            finding = _inconclusive(f"within what is known of the rates, the limit may be {either}.", _widest(report))
        elif narrow:
            cautions.append(f"A close call: within the intervals of the rates, the limit may be {either}.")
    return Verdict(
        bound=finding.bound,
        sentence=finding.sentence + _slow_rank(report),
        evidence=[Figure(name=name, value=value, unit=unit) for name, value, unit in finding.evidence],
        tries=[*finding.tries] or for_the_step(report, finding.bound),
        cautions=cautions,
    )


def _inconclusive(why: str, evidence: list[tuple[str, float, str]]) -> Finding:
    return Finding("inconclusive", f"Inconclusive: {why}", evidence)


def _rates(report: Report) -> dict[str, Rate]:
    return {name: rate for name in _DECISIVE if (rate := getattr(report.stages, name))}


def _known_between(report: Report, stage: str) -> tuple[float, float]:
    """The factors of a stage's rate between which the true one is.

    Other programs took cores from it, unless it runs on a GPU: without them it may be faster by as much.
    """
    rate: Rate = getattr(report.stages, stage)
    low, high = 1 / _FEW_STEPS, _FEW_STEPS
    if rate.interval:
        low, high = (end / rate.images_per_second for end in rate.interval)
    if stage == "loader" or not on_gpu(report):
        high /= 1 - min(0.9, rate.cores_of_others / report.hardware.cores)
    return low, high


def _other_answers(report: Report, bound: str, *, narrow_too: bool) -> set[str]:
    """What else the answer might be, at all ends of what is known of the rates. narrow_too: also of those known to ±5 %."""
    ends: list[tuple[float, ...]] = []
    for stage, as_measured in zip(_DECISIVE, Scale(), strict=True):
        low, high = _known_between(report, stage) if stage in _rates(report) else (1.0, 1.0)
        margin = (high - low) / 2
        if margin <= _SURE and not narrow_too:
            ends.append((as_measured,))
        elif stage == "training":
            # All that training varies by may be waiting, but hardly more of it than there was.
            margin = min(margin, wait_share(report.training_parts)) if report.training_parts else 0.0
            ends.append((-margin, margin))
        else:
            ends.append((low, high))
    return {answer(report, Scale(*corner)).bound for corner in product(*ends)} - {bound}


def _cautions(report: Report, *, slower_before: bool) -> list[str]:
    """Why the figures are less sure than they look, and what helps: first what most likely made them so.

    Too few steps are too few on any machine. An interval that is wide while other programs took cores is so because of them,
    and longer measuring would not make the machine quiet. slower_before: training was measured on a faster machine.
    """
    rates, cores = _rates(report), report.hardware.cores
    few, disturbed, wide = [], [], []
    for stage, rate in rates.items():
        name, steps = _named(stage).capitalize(), rate.images // report.config["batch_size"]
        more = "--steps" if rate.stopped_by == "steps" else "--seconds"
        if rate.interval is None or rate.relative_ci is None:
            few.append(
                f"{name} was measured for {steps} steps only, too few to say how sure its rate is: give it more {more}."
            )
        elif rate.relative_ci > _SURE:
            ends = " to ".join(f"{end:,.0f}" for end in rate.interval)
            wide.append(f"{name} is known to ±{rate.relative_ci:.0%} only ({ends} images/s): give it more {more}.")
    others = [rate.cores_of_others for rate in rates.values()]
    if slower_before or max(others) > _MANY_OTHERS * cores:
        changed = slower_before or max(others) - min(others) > _MANY_OTHERS * cores
        each = ", ".join(f"{rate.cores_of_others:.1f} beside {_named(stage)}" for stage, rate in rates.items())
        disturbed.append(
            f"{'The machine changed: other' if changed else 'Other'} programs kept so many of the {cores} cores busy: "
            f"{each}. Measure again on a quiet machine."
        )
    cautions = [*few, *disturbed, *wide]
    floor, measured = floor_of_passes(report), passes_seconds(report)
    if floor > 1.1 * measured:
        cautions.append(
            f"Forward and backward take {ms(measured)}, less than their floor of {ms(floor)}: the hardware's "
            "peaks were measured while it was slower, or values stay in a cache between two layers."
        )
    return cautions


def _excess(report: Report) -> str | None:
    """Why training is above its ceiling, to end a sentence with; None if it is not, or by chance. Of rates without intervals
    nobody knows by how much chance may have it: then no verdict hangs on them."""
    ratio, set_by = report.ceiling.training_over_ceiling or 0.0, report.ceiling.set_by
    known_to = [rate.relative_ci for stage, rate in _rates(report).items() if stage in ("training", set_by)]
    by_chance = sum(each**2 for each in known_to if each) ** 0.5
    if ratio <= _IMPOSSIBLE + by_chance:
        return None
    return ", and too few steps were measured to say whether by chance" if None in known_to else _SLOWER


def _widest(report: Report) -> list[tuple[str, float, str]]:
    """Two figures: the least and the most that a rate may be, of the one that is known least."""
    stages = [stage for stage in _rates(report) if stage != "training" or on_gpu(report)]  # as in the questions
    known = {stage: _known_between(report, stage) for stage in stages}
    stage = max(stages, key=lambda stage: known[stage][1] / known[stage][0])
    rate, ends = _rates(report)[stage].images_per_second, zip(("at least", "at most"), known[stage], strict=True)
    return [(f"{_named(stage)}, {end}", rate * factor, "images/s") for end, factor in ends]


def _named(stage: str) -> str:
    return "training" if stage == "training" else f"the {stage} alone"


def _slow_rank(report: Report) -> str:
    """A sentence about the rank for which the others wait; empty if there is none that is slower than by chance."""
    found = []
    for stage in ("reading", "decoding", *_DECISIVE):
        rate: Rate | None = getattr(report.stages, stage)
        if rate:
            rates = rate.images_per_second_per_rank
            known_to = 1 - 1 / _FEW_STEPS if rate.relative_ci is None else rate.relative_ci
            if (share := 1 - min(rates) / median(rates)) > max(_SLOW_RANK, known_to):
                found.append((share, rate.slowest_rank, stage))
    if not found:
        return ""
    share, rank, stage = max(found)
    machine = rank * report.hardware.machines // report.hardware.ranks
    where = f" (machine {machine})" if report.hardware.machines > 1 else ""
    return f" Rank {rank}{where} is {share:.0%} slower than the median rank in {stage}: in training, all wait for it."
