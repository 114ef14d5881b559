import math

import pytest

from engine.config import parse_args
from engine.training import schedule


def test_plateau_keeps_the_rate_while_top1_improves():
    assert schedule.plateau(0.01, [], 3) == (0.01, False)
    assert schedule.plateau(0.01, [0.1, 0.2, 0.3, 0.4], 1) == (0.01, False)
    assert schedule.plateau(0.01, [0.4, 0.3, 0.3], 3) == (0.01, False)


def test_plateau_drops_after_patience_and_counts_anew():
    history = [0.4, 0.3, 0.3, 0.4]
    assert schedule.plateau(0.01, history, 3) == (pytest.approx(1e-3), False)
    assert schedule.plateau(0.01, [*history, 0.4, 0.4], 3) == (pytest.approx(1e-3), False)
    assert schedule.plateau(0.01, [*history, 0.4, 0.4, 0.4], 3) == (pytest.approx(1e-4), False)


def test_plateau_compares_with_the_best_so_far():
    assert schedule.plateau(0.01, [0.5, 0.3, 0.4], 2)[0] == pytest.approx(1e-3), "0.4 is better than 0.3, not than 0.5"
    assert schedule.plateau(0.01, [0.5, 0.3, 0.6, 0.3], 2)[0] == 0.01


def test_plateau_drops_three_times_then_stops():
    rates = [schedule.plateau(1.0, [0.5] * (1 + epochs), 2) for epochs in range(9)]
    assert [rate for rate, _ in rates] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])
    assert [stop for _, stop in rates] == [False] * 8 + [True]


def test_plateau_ends_where_the_papers_run_did():
    """Improvement for 20 epochs, then a plateau; at each new rate some more: 3 drops, and a stop at the fourth plateau."""
    history = []
    for level in (0.5, 0.6, 0.65, 0.66):
        history += [level - 0.01 / (epoch + 1) for epoch in range(15)] + [level - 0.01] * 5
    assert schedule.plateau(0.01, history[:-1], 5) == (pytest.approx(1e-5), False)
    assert schedule.plateau(0.01, history, 5) == (pytest.approx(1e-5), True)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (29.99, 0.1), (30, 0.01), (59.9, 0.01), (60, 0.001)])
def test_step(epoch, rate):
    assert schedule.step(0.1, epoch, 30) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0), (2.5, 0.05), (5, 0.1), (47.5, 0.05), (90, 0), (95, 0), (26.25, 0.1 * (1 + math.sqrt(0.5)) / 2)],
)
def test_cosine(epoch, rate):
    assert schedule.cosine(0.1, epoch, 90, 5) == pytest.approx(rate, abs=1e-12)


def test_cosine_without_warm_up_or_with_nothing_else():
    assert schedule.cosine(0.1, 0, 10, 0) == pytest.approx(0.1)
    assert schedule.cosine(0.1, 3, 5, 5) == pytest.approx(0.06)
    assert schedule.cosine(0.1, 5, 5, 5) == 0.1


@pytest.mark.parametrize(
    ("flags", "done", "seen", "steps"),
    [
        ([], 0, 0, 8),  # 2 · 30 images in eights: the last step straddles the end
        ([], 3, 24, 8),
        ([], 5, 30, 9),  # five steps of six images each
        ([], 8, 64, 8),
        ([], 20, 500, 20),  # more than the epochs ask for now
        (["--steps", "7"], 0, 0, 7),
        (["--steps", "9"], 0, 0, 8),
        (["--steps", "7"], 8, 64, 7),
    ],
)
def test_steps_of_the_whole_training(flags, done, seen, steps):
    config = parse_args(["--data", "digits", "--epochs", "2", "--batch-size", "8", *flags])
    assert schedule.total_steps(config, 30, steps_done=done, samples_seen=seen) == steps
