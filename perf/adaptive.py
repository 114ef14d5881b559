"""Measuring as long as it takes: until a median is known well enough, or time or steps are used up, on all ranks alike."""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np

from common.ranks import Ranks, first_then_others, gather
from perf.laps import Lap, Laps
from perf.machine import busy_seconds
from perf.order_statistics import median_interval, summarise

_RELATIVE_CI = 0.01  # half the width of the median's confidence interval, of the median
_LEAST_LAPS_FOR_PRECISION = 20
_LAPS_AT_FIRST = 10
_SETTLING_STEPS = 2  # the optimizer's state, the caches, and on a GPU the search for kernels


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop at the latest."""

    seconds: float
    """Of one stage, warm-up not counted."""
    steps: int | None
    """Of one stage; None for no limit."""
    least_laps: int = 3
    """Whatever they cost."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one stage took on this rank."""

    laps: list[Lap]
    """Seconds a step of each of its parts. A lap is one step or several of them, and their mean."""
    stopped_by: str
    """precision, time or steps."""
    cpu_seconds: float
    """Processor time of this process, all threads, a step."""
    cores_of_others: float
    """How many of the machine's cores other programs kept busy, on average."""
    warm_up_steps: int
    warm_up_seconds: float
    """Steps that are not in the laps, and how long they took."""
    began: float
    ended: float
    """perf_counter() at the first lap's beginning and after the last one's end."""

    @property
    def step_seconds(self) -> list[float]:
        """Of each lap."""
        return [sum(lap.values()) for lap in self.laps]


def measure(step: Callable[[], object], *, laps: Laps, ranks: Ranks, limits: Limits, queue: int = 0) -> Timing:
    """Take steps, lap by lap; every rank must call this at the same time, and all make the same number.

    queue: steps that may lie ready when nobody asks for them. After every pause so many are not counted; and a lap is twice as
    long, if the time allows it, since what comes out of a queue comes in bursts, of which each step by itself has no
    meaningful median.
    The host never waits for the device between the laps' beginning and their end.
    """
    entered = perf_counter()
    pace = _pace(step, laps, _SETTLING_STEPS + queue)
    steps_a_lap, count = first_then_others(ranks, lambda: _first_block(pace, limits, queue), lambda decided: decided)
    made, taken, not_counted, cpu_seconds, pauses = 0, [], _SETTLING_STEPS + queue + 1, 0.0, 0.0
    began, busy_before, own_before = perf_counter(), busy_seconds(), process_time()
    while count:
        cpu_before = process_time()
        for _ in range(count):
            with laps.lap():
                for _ in range(steps_a_lap):
                    step()
        cpu_seconds += process_time() - cpu_before
        made += count
        taken += laps.take()
        seconds = [sum(lap.values()) for lap in taken] or [pace * steps_a_lap]
        spent = perf_counter() - began - pauses
        decide = functools.partial(_laps_to_go, seconds, spent, made, steps_a_lap, limits)
        count, stopped_by = first_then_others(ranks, decide, lambda decided: decided)
        if count and ranks.world_size > 1 and queue:  # while the ranks waited for rank 0, their queues filled up
            pause = perf_counter()
            for _ in range(queue + 1):
                step()
            not_counted += queue + 1
            pauses += perf_counter() - pause
    taken += laps.take(wait=True)
    ended = perf_counter()
    # All ranks of a machine do the same.
    own_seconds = ranks.local_world_size * (process_time() - own_before)
    return Timing(
        laps=[{part: seconds / steps_a_lap for part, seconds in lap.items()} for lap in taken],
        stopped_by=stopped_by,
        cpu_seconds=cpu_seconds / made / steps_a_lap,
        cores_of_others=max(0.0, busy_seconds() - busy_before - own_seconds) / (ended - began),
        warm_up_steps=not_counted,
        warm_up_seconds=began - entered + pauses,
        began=began,
        ended=ended,
    )


def rate(timing: Timing, *, images: int, ranks: Ranks) -> dict:
    """The RATE of a report; every rank must call this. images: in one step of one rank.

    In each lap the ranks' rates are added up. images_per_second_per_rank is that of the slowest rank, for which the others
    wait in training. cpu_seconds_per_step: of the rank that needs most. cores_of_others: on rank 0's machine.
    """
    everyone = gather((timing.step_seconds, timing.cpu_seconds), ranks)
    seconds = np.array([step_seconds for step_seconds, _ in everyone])
    together = (images / seconds).sum(axis=0)
    return {
        "images_per_second": summarise(together),
        "images_per_second_per_rank": float(images / np.median(seconds, axis=1).max()),
        "seconds_per_step": summarise(images * len(everyone) / together),
        "stopped_by": timing.stopped_by,
        "cpu_seconds_per_step": max(cpu_seconds for _, cpu_seconds in everyone),
        "cores_of_others": timing.cores_of_others,
    }


def _pace(step: Callable[[], object], laps: Laps, settle: int) -> float:
    """Seconds of a step, roughly."""
    for _ in range(settle):
        step()
    with laps.lap():
        step()
    (lap,) = laps.take(wait=True)
    return sum(lap.values())


def _first_block(pace: float, limits: Limits, queue: int) -> tuple[int, int]:
    """Steps in a lap, and laps to begin with."""
    affordable = limits.seconds / pace
    steps_a_lap = max(1, min(2 * queue, int(affordable / _LEAST_LAPS_FOR_PRECISION), limits.steps or 2 * queue))
    count = max(limits.least_laps, min(_LAPS_AT_FIRST, int(affordable / steps_a_lap)))
    return steps_a_lap, min(count, limits.steps // steps_a_lap) if limits.steps else count


def _laps_to_go(seconds: list[float], spent: float, made: int, steps_a_lap: int, limits: Limits) -> tuple[int, str]:
    """How many laps more and, where that is 0, why.

    seconds: of the laps so far, as far as they are known; spent: seconds until now. The interval's width goes with the root of
    the number of laps; since that is only so on average, the number is at most doubled before the next look.
    """
    if limits.steps and made >= limits.steps // steps_a_lap:
        return 0, "steps"
    interval, lap_seconds = median_interval(seconds), statistics.median(seconds)
    relative_ci = (interval[1] - interval[0]) / 2 / lap_seconds if interval else math.inf
    if relative_ci <= _RELATIVE_CI and len(seconds) >= _LEAST_LAPS_FOR_PRECISION:
        return 0, "precision"
    affordable = int((limits.seconds - spent) / lap_seconds)
    if affordable < 1:
        return 0, "time"
    wanted = made * (relative_ci / _RELATIVE_CI) ** 2 if interval else math.inf
    more = max(1, min(made, wanted - made, affordable))
    if limits.steps:
        more = min(more, limits.steps // steps_a_lap - made)
    return math.ceil(more), ""
