import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common.ranks import Ranks
from perf.adaptive import Limits, measure, rate
from perf.laps import Laps

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None)


class Step:
    """A step that takes as long as it is told to, on a clock of its own."""

    def __init__(self, monkeypatch, seconds) -> None:
        self.now, self.taken, self._seconds = 1000.0, 0, seconds
        for module in ("adaptive", "laps"):
            monkeypatch.setattr(f"{module}.perf_counter", lambda: self.now)
        monkeypatch.setattr("perf.adaptive.process_time", lambda: 2 * self.now)
        monkeypatch.setattr("perf.adaptive.busy_seconds", lambda: 5 * self.now)

    def __call__(self) -> None:
        self.now += self._seconds(self.taken)
        self.taken += 1


def time_it(step, *, seconds=10.0, steps=None, queue=0):
    return measure(
        step,
        laps=Laps(ALONE.device),
        ranks=ALONE,
        limits=Limits(seconds=seconds, steps=steps),
        queue=queue,
    )


def test_a_steady_step_stops_when_its_median_is_known(monkeypatch):
    step = Step(monkeypatch, lambda n: 0.01)
    timing = time_it(step)
    assert timing.stopped_by == "precision"
    assert 20 <= len(timing.laps) <= 40
    assert timing.step_seconds == pytest.approx([0.01] * len(timing.laps))
    assert timing.warm_up_steps == 3
    assert timing.warm_up_seconds == pytest.approx(0.03)
    assert step.taken == timing.warm_up_steps + len(timing.laps)
    assert timing.cpu_seconds == pytest.approx(0.02)
    assert timing.cores_of_others == pytest.approx(5 - 2)
    assert timing.ended - timing.began == pytest.approx(0.01 * len(timing.laps))


def test_a_noisy_step_gets_as_many_laps_as_its_noise_needs(monkeypatch):
    """For normal noise of 5 %, the median's interval has a half width of 1.96 · 1.2533 · 5 % / √n: 1 % at n = 151."""
    generator = np.random.default_rng(0)
    noise = generator.normal(1, 0.05, size=100_000)
    timing = time_it(Step(monkeypatch, lambda n: 0.01 * noise[n]), seconds=1000)
    assert timing.stopped_by == "precision"
    assert 75 < len(timing.laps) < 450
    assert np.median(timing.step_seconds) == pytest.approx(0.01, rel=0.015)


def test_time_is_a_limit(monkeypatch):
    generator = np.random.default_rng(0)
    noise = generator.uniform(0.5, 1.5, size=100_000)
    timing = time_it(Step(monkeypatch, lambda n: 0.1 * noise[n]), seconds=10)
    assert timing.stopped_by == "time"
    assert 8 < timing.ended - timing.began < 11
    assert len(timing.laps) == pytest.approx(100, abs=15)


def test_however_slow_there_are_three_laps(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 60.0), seconds=10)
    assert (timing.stopped_by, len(timing.laps)) == ("time", 3)


@pytest.mark.parametrize("steps", [1, 5, 8, 33])
def test_steps_are_a_limit(monkeypatch, steps):
    generator = np.random.default_rng(0)
    noise = generator.uniform(0.5, 1.5, size=100_000)
    step = Step(monkeypatch, lambda n: 0.1 * noise[n])
    timing = time_it(step, seconds=1000, steps=steps, queue=2)
    assert timing.stopped_by == "steps"
    assert steps - 4 < step.taken - timing.warm_up_steps <= steps


def test_bursts_out_of_a_queue_are_averaged(monkeypatch):
    """Two batches come at once, every other time: the median step would be wrong by its half, whichever it is."""
    timing = time_it(Step(monkeypatch, lambda n: 0.02 if n % 2 else 0.0001), queue=2)
    assert np.median(timing.step_seconds) == pytest.approx(0.01005)
    assert timing.warm_up_steps == 2 + 2 + 1


def test_laps_of_long_steps_are_short(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 1.0), seconds=10, queue=8)
    assert len(timing.laps) == 10


def test_on_the_real_clock():
    timing = time_it(lambda: time.sleep(0.004), seconds=0.5)
    assert 0.004 <= np.median(timing.step_seconds) < 0.008
    assert timing.cpu_seconds < 0.002, "sleeping needs no processor"


def test_a_busy_neighbour_is_seen():
    burn = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as neighbour:
        timing = time_it(lambda: time.sleep(0.02), seconds=1.0, steps=40)
        neighbour.kill()
    assert 0.3 < timing.cores_of_others <= len(os.sched_getaffinity(0)) + 0.1  # the system counts in ticks of 10 ms


def test_rates_of_ranks_are_added_and_the_slowest_is_named(monkeypatch):
    timing = time_it(Step(monkeypatch, lambda n: 0.01))
    slower = [0.04] * len(timing.laps)
    monkeypatch.setattr("perf.adaptive.gather", lambda own, ranks: [own, (slower, 0.03)])
    figures = rate(timing, images=8, ranks=ALONE)
    assert figures["images_per_second"]["median"] == pytest.approx(8 / 0.01 + 8 / 0.04)
    assert figures["images_per_second_per_rank"] == pytest.approx(8 / 0.04)
    assert figures["seconds_per_step"]["median"] == pytest.approx(16 / 1000)
    assert figures["cpu_seconds_per_step"] == 0.03
    assert figures["images_per_second"]["count"] == len(timing.laps)
