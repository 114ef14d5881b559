"""Measuring as long as it takes: until the mean is known well enough, or time or steps are used up, on all ranks alike."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np
from scipy.special import stdtrit

from common.ranks import Ranks, gather, on_rank_0
from perf.laps import BACKWARD, FORWARD, OPTIMIZER, Lap, Laps
from perf.machine import busy_seconds, watched
from perf.report import Rate, StepParts, Summary

SETTLING_STEPS = 2  # the optimizer's state, the caches, and on a GPU the search for kernels

_CONFIDENCE = 0.95
_LEAST_VALUES = 6  # for an interval: of fewer, nothing is known of how one value follows from the one before
_BATCHES = 10
_LARGEST_CORRELATION = 0.99

_RELATIVE_CI = 0.01  # half the width of the interval, of the mean
# A series without a stall looks steady however often it stalls elsewhere. Of n laps without one, stalls may come in up to 3 / n
# of all laps (95 % confidence): 150 have one of those that come in 2 % at random. What is rarer may be in no lap.
_LEAST_LAPS_FOR_PRECISION = 150
_LEAST_SHARE_OF_TIME = 0.25  # of the time limit: what stalls only now and then must have the time to do it
_LAPS_AT_FIRST = 10
_LAP_SECONDS = 1e-3  # at least, of several steps where they are shorter: to time a lap takes microseconds
_MOST_VALUES_OF_A_SERIES = 2000


# ---- as long as it takes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop at the latest."""

    seconds: float
    """Of one stage, warm-up not counted."""
    steps: int | None
    """Of one stage; None for no limit."""
    least_laps: int = 3
    """Whatever they cost; periods, where steps come in such."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one stage took on this rank."""

    laps: list[Lap]
    """Seconds a step of each of its parts, in order. A lap is one step or several of them, and their mean."""
    steps_a_lap: int
    laps_a_period: int
    stopped_by: str
    """precision, time or steps."""
    cpu_seconds: float
    """Processor time of this process, all threads, a step."""
    cores_of_others: float
    """How many of the cores that this machine gives us other programs kept busy, on average."""
    warm_up_steps: int
    warm_up_seconds: float
    """Steps that are not in the laps, and how long they took."""
    began: float
    ended: float
    """perf_counter() at the first lap's beginning and after the last one's end."""

    @property
    def step_seconds(self) -> np.ndarray:
        """Of each lap: float64 [laps]."""
        return np.array([sum(lap.values()) for lap in self.laps])

    def part(self, name: str) -> np.ndarray:
        """Seconds a step of one part, of each lap: float64 [laps]."""
        return np.array([lap.get(name, 0.0) for lap in self.laps])


def measure(
    step: Callable[[], object],
    *,
    laps: Laps,
    ranks: Ranks,
    limits: Limits,
    queue: int = 0,
    period: int = 1,
) -> Timing:
    """Take steps, lap by lap; every rank must call this at the same time, and all make the same number.

    queue: steps that may lie ready when nobody asks for them; so many are not counted, at first and after every pause, or as many
    as a quarter of the time allows: what feeds the steps begins with them, so that little lies ready. period: steps after which
    bursts come again; then all of the queue is waited for, and whole periods are counted, at least limits.least_laps of them
    unless limits.steps are fewer. The host never waits for the device between the laps' beginning and their end.
    """
    entered = perf_counter()
    for _ in range(SETTLING_STEPS):
        step()
    if period == 1 and queue:
        affordable = math.ceil(_LEAST_SHARE_OF_TIME * limits.seconds / _pace(step, laps, 1))
        queue = on_rank_0(ranks, lambda: min(queue, affordable))
    pace = _pace(step, laps, queue + (period > 1 or not queue))
    steps_a_lap, count = on_rank_0(ranks, lambda: _first_block(pace, limits, queue, period))
    made, taken, not_counted, cpu_seconds, pauses = 0, [], SETTLING_STEPS + queue + 1, 0.0, 0.0
    began, busy_before, own_before = perf_counter(), busy_seconds(), process_time()
    laps.begin()
    while count:
        cpu_before = process_time()
        for _ in range(count):
            for _ in range(steps_a_lap):
                step()
            laps.end_lap()
        cpu_seconds += process_time() - cpu_before
        made += count
        taken += laps.take()
        seconds = np.array([sum(lap.values()) for lap in taken] or [pace * steps_a_lap])
        spent = max(perf_counter() - began - pauses, float(seconds.sum()))
        decide = functools.partial(laps_to_go, seconds, spent, made, steps_a_lap, limits, period=period)
        count, stopped_by = on_rank_0(ranks, decide)
        if count and ranks.world_size > 1 and queue:  # while the ranks waited for rank 0, their queues filled up
            laps.pause()
            pause, again = perf_counter(), 2 * period if period > 1 else queue + 1
            for _ in range(again):
                step()
            not_counted += again
            pauses += perf_counter() - pause
            laps.begin()
    laps.pause()
    taken += laps.take(wait=True)
    ended = perf_counter()
    busy, own = busy_seconds() - busy_before, (ranks.rank - ranks.local_rank, watched(), process_time() - own_before)
    # The ranks that the same cores of the same machine are for.
    of_ranks = sum(seconds for *where, seconds in gather(own, ranks) if where == [*own[:2]])
    return Timing(
        laps=[{part: seconds / steps_a_lap for part, seconds in lap.items()} for lap in taken],
        steps_a_lap=steps_a_lap,
        laps_a_period=period,
        stopped_by=stopped_by,
        cpu_seconds=cpu_seconds / made / steps_a_lap,
        cores_of_others=max(0.0, busy - of_ranks) / (ended - began),
        warm_up_steps=not_counted,
        warm_up_seconds=began - entered + pauses,
        began=began,
        ended=ended,
    )


def rate_of(timing: Timing, *, images: int, ranks: Ranks) -> Rate:
    """Every rank must call this. images: of one rank in one step. cores_of_others is that of this rank."""
    own = timing.step_seconds
    everyone = gather((float(own.mean()), timing.cpu_seconds), ranks)
    means = [mean for mean, _ in everyone]
    slowest = means.index(max(means))
    series = next(each for each in gather(own if ranks.rank == slowest else None, ranks) if each is not None)
    mean, steps, rate = max(means), len(own) * timing.steps_a_lap, images * len(everyone) / max(means)
    interval = interval_of_mean(by_period(series, timing.laps_a_period))
    if interval:
        relative = (interval[1] - interval[0]) / 2 / mean
        interval = (rate / (1 + relative), rate / (1 - relative)) if relative < 1 else None
    values, neighbours = thinned(series)
    return Rate(
        images=images * steps * len(everyone),
        seconds=mean * steps,
        images_per_second=rate,
        interval=interval,
        images_per_second_per_rank=[images / mean for mean in means],
        step_seconds=summarise(series),
        series_seconds=values,
        steps_a_lap=timing.steps_a_lap * neighbours,
        stopped_by=timing.stopped_by,
        cpu_seconds_per_step=max(cpu_seconds for _, cpu_seconds in everyone),
        cores_of_others=timing.cores_of_others,
    )


def step_parts(step: Timing, alone: Timing | None) -> StepParts:
    """alone: of the step without its all-reduce. The all-reduce's part is what the backward pass takes longer than there, the
    wait for the slowest rank included."""
    backward, all_reduce = step.part(BACKWARD), None
    if alone:  # noise may have it longer than with the all-reduce
        without = min(alone.part(BACKWARD), backward, key=lambda seconds: float(seconds.mean()))
        backward, all_reduce = without, summarise(backward - without.mean())
    return StepParts(
        forward=summarise(step.part(FORWARD)),
        backward=summarise(backward),
        all_reduce=all_reduce,
        optimizer=summarise(step.part(OPTIMIZER)),
    )


def by_period(series: np.ndarray, laps_a_period: int) -> np.ndarray:
    """Means of whole periods; the series itself, if it has none."""
    periods = len(series) // laps_a_period
    return series[: periods * laps_a_period].reshape(periods, laps_a_period).mean(axis=1) if periods else series


def laps_to_go(
    seconds: np.ndarray, spent: float, made: int, steps_a_lap: int, limits: Limits, *, period: int = 1
) -> tuple[int, str]:
    """How many laps more and, where that is 0, why.

    seconds: of the laps so far, as far as they are known, at least one; spent: seconds until now; period: laps of which only
    whole multiples are made. The interval's width goes with the root of the number of laps; since that is only so on average,
    the number is at most doubled before the next look.
    """
    most = limits.steps // steps_a_lap if limits.steps else math.inf
    if made >= most:
        return 0, "steps"
    units, unit_seconds = by_period(seconds, period), float(seconds.mean()) * period
    interval = interval_of_mean(units)
    relative_ci = (interval[1] - interval[0]) / 2 / float(units.mean()) if interval else math.inf
    precise = relative_ci <= _RELATIVE_CI and len(units) >= _LEAST_LAPS_FOR_PRECISION
    early = _LEAST_SHARE_OF_TIME * limits.seconds - spent
    if precise and early <= 0:
        return 0, "precision"
    affordable = int((limits.seconds - spent) / unit_seconds)
    if affordable < 1:
        return 0, "time"
    units_made = made / period
    wanted = early / unit_seconds if precise else units_made * (relative_ci / _RELATIVE_CI) ** 2 - units_made
    more = period * math.ceil(max(1, min(units_made, wanted, affordable)))
    return int(min(more, most - made)), ""


def _pace(step: Callable[[], object], laps: Laps, steps: int) -> float:
    """Take so many steps; their mean seconds."""
    laps.begin()
    for _ in range(steps):
        step()
    laps.end_lap()
    laps.pause()
    (lap,) = laps.take(wait=True)
    return sum(lap.values()) / steps


def _first_block(pace: float, limits: Limits, queue: int, period: int) -> tuple[int, int]:
    """Steps in a lap, which is one where there are periods, and laps to begin with."""
    most = 2 * queue if queue else math.inf  # what comes out of a queue may be fast for a moment
    steps_a_lap = int(max(1, min(math.ceil(_LAP_SECONDS / pace), most))) if period == 1 else 1
    if limits.steps:  # few steps are single ones, so that all of them are made
        steps_a_lap = min(steps_a_lap, max(1, limits.steps // _LEAST_LAPS_FOR_PRECISION))
    affordable = int(limits.seconds / (pace * steps_a_lap * period))
    count = period * max(limits.least_laps, min(_LAPS_AT_FIRST, affordable))
    return steps_a_lap, min(count, limits.steps // steps_a_lap) if limits.steps else count


# ---- what the values say ------------------------------------------------------------------------------------------


def summarise(values: Sequence[float] | np.ndarray) -> Summary:
    """Of at least one value."""
    p5, median, p95 = np.percentile(values, (5, 50, 95)).tolist()
    return Summary(
        mean=float(np.mean(values)), median=median, p5=p5, p95=p95, min=float(np.min(values)), max=float(np.max(values))
    )


def interval_of_mean(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Where the mean of the process lies, of which these values follow each other in time: with 95 % confidence. None for
    fewer than six.

    The wider one of two intervals. One takes the series as autoregressive of order 1: n values of correlation ρ are worth
    n (1 - ρ) / (1 + ρ) independent ones. The estimate of ρ is too low by (1 + 3 ρ) / n (Kendall 1954) and known to its standard
    error only, so both are added. The other is of ten batch means, for what is correlated in another way.
    """
    series = np.asarray(values, dtype=np.float64)
    if len(series) < _LEAST_VALUES:
        return None
    mean, half = float(series.mean()), 0.0
    if np.ptp(series) > 0:
        half = max(_half_of_autoregressive(series - mean), _half_of_batch_means(series))
    return mean - half, mean + half


def _half_of_autoregressive(deviations: np.ndarray) -> float:
    count, squares = len(deviations), float(deviations @ deviations)
    correlation = float(deviations[1:] @ deviations[:-1]) / squares
    correlation += (1 + 3 * correlation) / count
    correlation += math.sqrt(max(0.0, 1 - correlation**2) / count)
    correlation = min(max(correlation, 0.0), _LARGEST_CORRELATION)
    worth = count * (1 - correlation) / (1 + correlation)
    variance = squares / count / max(1 - 1 / worth, 0.05)  # the deviations are from their own mean
    return _student(max(2.0, worth - 1)) * math.sqrt(variance / worth)


def _half_of_batch_means(series: np.ndarray) -> float:
    if len(series) < 2 * _BATCHES:
        return 0.0
    means = series[len(series) % _BATCHES :].reshape(_BATCHES, -1).mean(axis=1)
    return _student(_BATCHES - 1) * float(means.std(ddof=1)) / math.sqrt(_BATCHES)


def _student(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + _CONFIDENCE) / 2))


def thinned(series: np.ndarray) -> tuple[list[float], int]:
    """A series of at most 2,000 values, and how many neighbours each of them stands for.

    A value is the mean of its neighbours; or the largest of them where that is more than twice the median of all, so that a
    stall stays as long as it was.
    """
    size = -(-len(series) // _MOST_VALUES_OF_A_SERIES)
    starts = np.arange(0, len(series), size)
    peaks = np.maximum.reduceat(series, starts)
    means = np.add.reduceat(series, starts) / np.diff(starts, append=len(series))
    return np.where(peaks > 2 * np.median(series), peaks, means).tolist(), size
