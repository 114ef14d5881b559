"""The search, over made-up functions with a known optimum and noise."""

import random

import pytest

from perf.coordinate_search import Coordinate, TimeUp, beats_spread, climb, paired_gains

THREADS, PREFETCH, MODE = (1, 2, 3, 4, 6, 8), (1, 2, 4), ("a", "b")
COORDINATES = [
    Coordinate("threads", lambda _: [{"threads": count} for count in THREADS]),
    Coordinate("prefetch", lambda _: [{"prefetch": count} for count in PREFETCH]),
    Coordinate("mode", lambda _: [{"mode": mode} for mode in MODE]),
]
START = {"threads": 1, "prefetch": 1, "mode": "a"}


def speed(settings) -> float:
    """Best at 4 threads in mode b, at 6 in mode a; the prefetch depth does nothing."""
    best = 6 if settings["mode"] == "a" else 4
    return 1000 / (1 + 0.1 * abs(settings["threads"] - best)) * (1.5 if settings["mode"] == "b" else 1)


def noisy(function, seed: int, noise: float = 0.02, drift: float = 0.0):
    """Each measurement is the function's value times a normal factor, and a machine that becomes slower from one to the next."""
    draw, count = random.Random(seed), 0

    def measure(settings) -> float:
        nonlocal count
        count += 1
        return function(settings) * (1 + draw.gauss(0, noise)) * (1 - drift) ** count

    return measure


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_optimum_through_noise_although_one_setting_depends_on_another(seed):
    best, missed = climb(START, COORDINATES, noisy(speed, seed))
    assert best == {"threads": 4, "prefetch": 1, "mode": "b"}
    assert missed == []


@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_becomes_slower_hides_no_gain(seed):
    best, _ = climb(START, COORDINATES, noisy(speed, seed, noise=0.01, drift=0.02))
    assert (best["threads"], best["mode"]) == (4, "b")


@pytest.mark.parametrize("drift", [0.0, 0.02, -0.02])
def test_noise_is_not_taken_for_a_gain(drift):
    """Three settings that do nothing: 1.1 % each may be kept, and fewer are, since most do not come that far."""
    kept = sum(climb(START, COORDINATES, noisy(lambda _: 1000.0, seed, drift=drift))[0] != START for seed in range(500))
    assert kept <= 25, "5 %; 16.5 expected at most"


def test_without_noise_nothing_worse_is_kept():
    best, _ = climb({"threads": 4, "prefetch": 1, "mode": "b"}, COORDINATES, speed)
    assert best == {"threads": 4, "prefetch": 1, "mode": "b"}


def test_what_does_not_run_is_passed_over():
    best, missed = climb(START, COORDINATES, lambda settings: None if settings["mode"] == "b" else speed(settings))
    assert best == {"threads": 6, "prefetch": 1, "mode": "a"}
    assert missed == []


def test_what_the_time_did_not_suffice_for_is_named():
    measured = 0

    def measure(settings):
        nonlocal measured
        measured += 1
        if measured > 20:
            raise TimeUp
        return speed(settings)

    best, missed = climb(START, COORDINATES, measure)
    assert best == {"threads": 6, "prefetch": 1, "mode": "a"}, "6 candidates, then 4 pairs"
    assert missed == ["mode"], "3 candidates for the prefetch depth, and 3 measurements were left"


def test_a_setting_is_followed_step_by_step():
    beside = Coordinate("threads", lambda now: [{"threads": now["threads"] + step} for step in (-1, 1)])
    best, missed = climb({"threads": 1, "mode": "b"}, [beside], speed)
    assert (best["threads"], missed) == (4, [])


@pytest.mark.parametrize(("disturbed", "kept"), [({5}, True), ({5, 13}, False)])
def test_pairs_of_which_one_was_disturbed_are_measured_once_more(disturbed, kept):
    """Of the measurements 0 and 1 the candidate is chosen, 2 to 9 are the first pairs, 10 to 17 the second ones."""
    count = -1

    def measure(settings):
        nonlocal count
        count += 1
        return (10.0 if settings["n"] == 2 else 8.0) * (0.5 if count in disturbed else 1)

    best, _ = climb({"n": 1}, [Coordinate("n", lambda _: [{"n": 2}])], measure)
    assert (best == {"n": 2}) == kept


def test_pairs_alternate():
    asked = []

    def measure(settings):
        asked.append(settings["n"])
        return settings["n"]

    assert list(paired_gains({"n": 1}, {"n": 2}, measure)) == [1.0] * 4
    assert asked == [1, 2, 2, 1, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([0.10, 0.12, 0.11, 0.13], True),
        ([0.10, 0.10, 0.10, 0.21], False),
        ([0.01, 0.02, 0.01, 0.02], True),
        ([-0.10, -0.10, -0.10, -0.10], False),
        ([0.0, 0.0, 0.0, 0.0], False),
        ([0.10, 0.11, 0.12], True),
        ([0.5, 0.5], False),
        ([], False),
    ],
)
def test_a_gain_must_be_larger_than_the_spread(gains, kept):
    assert beats_spread(gains) == kept
