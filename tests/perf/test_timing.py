"""How long is measured, what the figures are, and whether their intervals hold what they say."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import signal, stats

from common.ranks import Ranks
from perf.laps import Laps
from perf.timing import Limits, interval_of_mean, laps_to_go, measure, rate_of, summarise, thinned

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None)


class Step:
    """A step that takes as long as it is told to, on a clock of its own."""

    def __init__(self, monkeypatch, seconds) -> None:
        self.now, self.taken, self._seconds = 1000.0, 0, seconds
        for module in ("timing", "laps"):
            monkeypatch.setattr(f"perf.{module}.perf_counter", lambda: self.now)
        monkeypatch.setattr("perf.timing.process_time", lambda: 2 * self.now)
        monkeypatch.setattr("perf.timing.busy_seconds", lambda: 5 * self.now)

    def __call__(self) -> None:
        self.now += self._seconds(self.taken)
        self.taken += 1


def time_it(step, *, seconds=10.0, steps=None, queue=0, period=1):
    return measure(
        step,
        laps=Laps(ALONE.device),
        ranks=ALONE,
        limits=Limits(seconds=seconds, steps=steps),
        queue=queue,
        period=period,
    )


def autoregressive(correlation, count, spread, generator):
    """Series of mean 1: float64 [replicates, values]."""
    noise = generator.standard_normal(count) * np.sqrt(1 - correlation**2)
    noise[:, 0] /= np.sqrt(1 - correlation**2)
    return 1 + spread * signal.lfilter([1], [1, -correlation], noise, axis=1)


def interval_of(values) -> tuple[float, float]:
    interval = interval_of_mean(values)
    assert interval
    return interval


# ---- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.002, 0.01, 0.03])
@pytest.mark.seconds
def test_the_interval_holds_the_mean_when_it_is_what_stops_the_measuring(correlation, spread):
    """At least 90 % of the intervals, of 500 stages of an autoregressive series, stopped by the function that stops a stage."""
    generator, limits = (
        np.random.default_rng(int(1e4 * spread) + int(10 * correlation)),
        Limits(seconds=1e4, steps=None),
    )
    hits, replicates = 0, 500
    for series in autoregressive(correlation, (replicates, 6000), spread, generator):
        made = more = 10
        while more:
            # 2,500 s lie behind each stage already, the least that any takes: nothing but the interval decides.
            more, why = laps_to_go(series[:made], 2500 + made, made, 1, limits)
            made = min(made + more, len(series))
            if made == len(series):
                break
        low, high = interval_of(series[:made])
        hits += low <= 1 <= high
        assert made == len(series) or (why == "precision" and made >= 150)
    assert hits / replicates >= 0.9


@pytest.mark.parametrize(("stalling", "of"), [(8, 40), (1, 50)])
@pytest.mark.parametrize("seconds", [60, 100, 150, 600])
def test_stalls_that_come_within_fifty_steps_are_waited_for(stalling, of, seconds):
    """Steps of a second and stalls of another, at any phase: what precedes the first stall looks steady, and must not end it."""
    generator, hits, replicates = np.random.default_rng(seconds + of), 0, 60
    for _ in range(replicates):
        numbers = np.arange(1200) + generator.integers(of)
        series = 1 + 0.002 * generator.standard_normal(1200) + (numbers % of < stalling)
        made, more = 0, 10
        while more:
            made += more
            more, _ = laps_to_go(series[:made], series[:made].sum(), made, 1, Limits(seconds=seconds, steps=None))
        low, high = interval_of(series[:made])
        hits += low <= 1 + stalling / of <= high
    assert hits / replicates >= 0.9


@pytest.mark.parametrize("seconds", [150, 240, 400])
def test_stalls_at_random_in_2_percent_of_the_steps_are_in_the_interval(seconds):
    """Stalls of five steps, wherever the time allows 150 steps. Sixty would be without one in 30 % of stages, and look steady."""
    generator, hits, replicates = np.random.default_rng(0), 0, 200
    for _ in range(replicates):
        series = 1 + 0.002 * generator.standard_normal(600) + 5 * (generator.random(600) < 0.02)
        made, more = 0, 10
        while more:
            made += more
            more, _ = laps_to_go(series[:made], series[:made].sum(), made, 1, Limits(seconds=seconds, steps=None))
        low, high = interval_of(series[:made])
        hits += low <= 1 + 5 * 0.02 <= high
    assert hits / replicates >= 0.85


@pytest.mark.parametrize("correlation", [0, 0.5, 0.9])
def test_the_interval_is_as_wide_as_the_means_spread(correlation):
    """Of long series, against the exact deviation of an autoregressive mean: neither too narrow nor much too wide."""
    series = autoregressive(correlation, (100, 4000), 0.1, np.random.default_rng(3))
    intervals = np.array([interval_of_mean(each) for each in series])
    exact = 0.1 * np.sqrt((1 + correlation) / (1 - correlation) / 4000)
    assert 1.96 * exact < np.median(intervals[:, 1] - intervals[:, 0]) / 2 < 1.5 * 1.96 * exact


def test_independent_values_have_about_students_interval():
    values = np.random.default_rng(1).normal(5, 1, size=6000)
    low, high = interval_of(values)
    expected = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert expected[1] - expected[0] <= high - low < 1.6 * (expected[1] - expected[0])


def test_slow_waves_widen_the_interval():
    """A correlation that no autoregressive process of order 1 has: batch means see it."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        waves = np.repeat(generator.normal(1, 0.1, size=30), 30) + generator.normal(0, 0.3, size=900)
        low, high = interval_of(waves)
        hits += low <= 1 <= high
    assert hits >= 0.9 * 300


def test_few_values_have_no_interval_and_equal_ones_an_empty_one():
    assert interval_of_mean([1.0, 2.0, 1.5, 1.2, 1.1]) is None
    assert interval_of_mean([2.0] * 6) == (2.0, 2.0)


def test_a_summary():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
    summary = summarise(values)
    assert (summary.min, summary.max, summary.mean, summary.median) == (1.0, 9.0, 4.0, 3.5)
    assert summary.p5 == pytest.approx(np.quantile(values, 0.05))
    assert summary.p95 == pytest.approx(np.quantile(values, 0.95))


def test_a_stall_stays_visible_in_a_thinned_series():
    series = np.full(10_001, 0.01)
    series[4321] = 0.5
    values, neighbours = thinned(series)
    assert (len(values), neighbours) == (1667, 6)
    assert values[4321 // 6] == 0.5
    assert max(value for place, value in enumerate(values) if place != 4321 // 6) == pytest.approx(0.01)
    noise = np.random.default_rng(0).normal(1, 0.1, size=10_000)
    assert np.mean(thinned(noise)[0]) == pytest.approx(noise.mean()), "means of neighbours, where nothing stalls"
    assert thinned(series[:2000]) == (series[:2000].tolist(), 1)


# ---- how long -----------------------------------------------------------------------------------------------------


def test_a_steady_step_stops_when_its_mean_is_known_and_a_quarter_of_the_time_is_over(monkeypatch):
    step = Step(monkeypatch, lambda n: 0.01)
    timing = time_it(step)
    assert timing.stopped_by == "precision"
    assert 2.5 <= timing.ended - timing.began < 2.6
    assert timing.step_seconds == pytest.approx([0.01] * len(timing.laps))
    assert timing.warm_up_steps == 3
    assert timing.warm_up_seconds == pytest.approx(0.03)
    assert step.taken == timing.warm_up_steps + len(timing.laps)
    assert timing.cpu_seconds == pytest.approx(0.02)
    assert timing.cores_of_others == pytest.approx(5 - 2)
    assert timing.ended - timing.began == pytest.approx(0.01 * len(timing.laps))


def test_a_noisy_step_gets_as_many_laps_as_its_noise_needs(monkeypatch):
    """For normal noise of 5 %, the mean's interval has a half width of 1.96 · 5 % / √n: 1 % at n = 96."""
    noise = np.random.default_rng(0).normal(1, 0.05, size=100_000)
    timing = time_it(Step(monkeypatch, lambda n: 0.01 * noise[n]), seconds=4)
    assert timing.stopped_by == "precision"
    assert 96 < len(timing.laps) < 300
    assert timing.step_seconds.mean() == pytest.approx(0.01, rel=0.015)


@pytest.mark.parametrize("stalling", [range(8), range(32, 40), range(0, 40, 5)])
def test_stalls_do_not_vanish(monkeypatch, stalling):
    """8 of 40 steps stall for 10 ms: the rate is that of images over all time, and its interval holds the truth."""
    timing = time_it(Step(monkeypatch, lambda n: 0.000261 + 0.01 * (n % 40 in stalling)), seconds=20)
    rate = rate_of(timing, images=32, ranks=ALONE)
    truth = 40 * 32 / (40 * 0.000261 + 8 * 0.01)
    assert rate.images_per_second == pytest.approx(rate.images / rate.seconds)
    assert rate.images_per_second == pytest.approx(truth, rel=0.02)
    assert rate.seconds == pytest.approx(timing.ended - timing.began)
    assert rate.interval
    assert rate.interval[0] <= truth <= rate.interval[1]
    assert max(rate.series_seconds) > 0.0025, "and they are seen in the series"


def test_time_between_two_steps_counts(monkeypatch):
    """The clock moves on while nobody is in a step: that time is somebody's, and the rate's."""
    step = Step(monkeypatch, lambda n: 0.01)
    laps = Laps(ALONE.device)
    end_lap = laps.end_lap

    def end_lap_and_stall() -> None:
        end_lap()
        step.now += 0.03

    monkeypatch.setattr(laps, "end_lap", end_lap_and_stall)
    timing = measure(step, laps=laps, ranks=ALONE, limits=Limits(seconds=10, steps=None))
    assert timing.step_seconds[1:] == pytest.approx(0.04)


def test_time_is_a_limit(monkeypatch):
    noise = np.random.default_rng(0).uniform(0.5, 1.5, size=100_000)
    timing = time_it(Step(monkeypatch, lambda n: 0.1 * noise[n]), seconds=10)
    assert timing.stopped_by == "time"
    assert 8 < timing.ended - timing.began < 11
    assert len(timing.laps) == pytest.approx(100, abs=15)


def test_however_slow_there_are_three_laps(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 60.0), seconds=10)
    assert (timing.stopped_by, len(timing.laps)) == ("time", 3)
    assert rate_of(timing, images=1, ranks=ALONE).interval is None


@pytest.mark.parametrize("steps", [1, 5, 8, 33])
@pytest.mark.parametrize("period", [1, 7])
def test_steps_are_a_limit(monkeypatch, steps, period):
    noise = np.random.default_rng(0).uniform(0.5, 1.5, size=100_000)
    step = Step(monkeypatch, lambda n: 0.1 * noise[n])
    timing = time_it(step, seconds=1000, steps=steps, queue=2, period=period)
    assert timing.stopped_by == "steps"
    assert step.taken - timing.warm_up_steps == steps


@pytest.mark.parametrize("phase", [0, 1, 20, 39])
def test_whole_periods_are_counted(monkeypatch, phase):
    """A window of 40 batches is waited for, and is then there at once: however few periods the time allows."""
    timing = time_it(Step(monkeypatch, lambda n: 4.0 if n % 40 == phase else 1e-5), seconds=10, queue=20, period=40)
    assert len(timing.laps) * timing.steps_a_lap % 40 == 0
    assert len(timing.laps) * timing.steps_a_lap >= 3 * 40
    assert rate_of(timing, images=10, ranks=ALONE).images_per_second == pytest.approx(400 / 4, rel=0.001)


def test_short_steps_are_timed_several_at_once(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 1e-5), seconds=1)
    assert timing.steps_a_lap == pytest.approx(100, abs=1)
    assert timing.step_seconds == pytest.approx(1e-5)


def test_what_lay_ready_is_not_counted(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 1e-6 if n < 12 else 1.0), seconds=10, queue=10)
    assert timing.warm_up_steps == 2 + 10 + 1
    assert timing.step_seconds == pytest.approx(1.0)
    assert len(timing.laps) == 10


def test_on_the_real_clock():
    timing = time_it(lambda: time.sleep(0.004), seconds=0.5)
    assert 0.004 <= np.median(timing.step_seconds) < 0.008
    assert timing.step_seconds.sum() == pytest.approx(timing.ended - timing.began, rel=0.05)
    assert timing.cpu_seconds < 0.002, "sleeping needs no processor"


def test_a_busy_neighbour_is_seen():
    burn = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as neighbour:
        timing = time_it(lambda: time.sleep(0.02), seconds=1.0, steps=40)
        neighbour.kill()
    assert 0.3 < timing.cores_of_others <= len(os.sched_getaffinity(0)) + 0.1  # the system counts in ticks of 10 ms


@pytest.mark.parametrize(
    ("machine", "cores", "others"), [(0, {0, 1}, 5 - 2 * 2), (0, {2, 3}, 5 - 2), (8, {0, 1}, 5 - 2)]
)
def test_ranks_on_the_same_cores_are_no_other_programs(monkeypatch, machine, cores, others):
    """Each of two ranks keeps two cores busy, and five are."""
    step = Step(monkeypatch, lambda n: 0.01)
    monkeypatch.setattr("perf.timing.watched", lambda: frozenset({0, 1}))
    monkeypatch.setattr("perf.timing.gather", lambda own, ranks: [own, (machine, frozenset(cores), own[-1])])
    two = Ranks(rank=0, world_size=2, local_rank=0, local_world_size=2, device=torch.device("cpu"), patient_group=None)
    timing = measure(step, laps=Laps(two.device), ranks=two, limits=Limits(seconds=4, steps=None))
    assert timing.cores_of_others == pytest.approx(others)


def test_the_slowest_rank_sets_the_rate(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 0.01))
    slower = np.linspace(0.03, 0.05, len(timing.laps))
    answers = iter([[(0.01, 0.02), (0.04, 0.03)], [None, slower]])
    monkeypatch.setattr("perf.timing.gather", lambda own, ranks: next(answers))
    rate = rate_of(timing, images=8, ranks=ALONE)
    assert rate.images == 16 * len(timing.laps)
    assert rate.seconds == pytest.approx(0.04 * len(timing.laps))
    assert rate.images_per_second == pytest.approx(16 / 0.04)
    assert rate.images_per_second_per_rank == pytest.approx([800, 200])
    assert rate.slowest_rank == 1
    assert rate.step_seconds.mean == pytest.approx(0.04)
    assert rate.series_seconds == slower.tolist()
    assert rate.cpu_seconds_per_step == 0.03


def test_ranks_that_wait_for_rank_0_count_neither_the_pause_nor_what_it_let_pile_up(monkeypatch):
    """Another rank decides when to go on; what lies ready by then comes out of the queue before the next lap."""
    step = Step(monkeypatch, lambda n: 0.01)

    def decided_late(ranks, call):
        step.now += 5.0
        return call()

    monkeypatch.setattr("perf.timing.on_rank_0", decided_late)
    two = Ranks(rank=1, world_size=2, local_rank=1, local_world_size=2, device=torch.device("cpu"), patient_group=None)
    timing = measure(step, laps=Laps(two.device), ranks=two, limits=Limits(seconds=4, steps=None), queue=4)
    assert timing.step_seconds == pytest.approx(0.01)
    assert timing.warm_up_steps > 2 + 5
    assert step.taken == timing.warm_up_steps + len(timing.laps)
