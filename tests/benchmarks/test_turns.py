"""benchmarks/turns.py: who is asked when, and what is said of the ratios."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import flag_parser, turns
from benchmarks.turns import add_turn_flags, compare_calls, interval, ratio_text, summarise, table, take_turns
from common.errors import UserError


def test_every_other_round_goes_the_other_way_round():
    asked: list[str] = []

    def of(name):
        def turn() -> float:
            asked.append(name)
            return len(asked)

        return turn

    figures = take_turns({name: of(name) for name in "abc"}, rounds=2)
    assert "".join(asked) == "abc" + "cba"
    assert figures == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_what_was_prefetched_is_not_counted(monkeypatch, capsys):
    clock = itertools.count()  # a second at each look
    monkeypatch.setattr(turns, "perf_counter", lambda: float(next(clock)))
    pauses: list[float] = []
    monkeypatch.setattr(turns, "sleep", pauses.append)
    stream = itertools.count()
    settings: Any = {"images": 32, "rounds": 3, "batches": 5, "device": torch.device("cpu"), "pause_seconds": 4.0}
    rows = compare_calls("a stream", {"a": stream.__next__}, times=("a",), **settings)
    assert rows["a"]["images_per_second"] == [5 * 32.0] * 3
    assert "a stream" in capsys.readouterr().out
    assert next(stream) == 3 * (turns.NOT_COUNTED + 5)
    assert pauses == [4.0] * 3


def test_ratios_are_of_a_round():
    rates = {"ours": [100.0, 200.0, 400.0], "theirs": [50.0, 50.0, 100.0]}
    rows = summarise(rates, times=("ours",))
    assert rows["theirs"]["images_per_second"] == [50.0, 50.0, 100.0]
    assert rows["theirs"]["times ours"] == [4.0, 2.0, 4.0]
    assert rows["ours"]["times ours, 95 %"] == [1.0, 1.0]
    shares = summarise(rates, of="ours")
    assert shares["theirs"]["of ours"] == [0.25, 0.25, 0.5]


def test_interval_of_many_is_the_medians_by_order_statistics():
    """Of n values between the k-th from below and from above: with k - 1 the highest quantile of tosses that is below 2.5 %."""
    for count in (9, 10, 25, 130):
        values = sorted(np.random.default_rng(count).lognormal(0, 0.1, count).tolist())
        rank = int(stats.binom.ppf(0.025, count, 0.5))
        assert interval(values[::-1]) == pytest.approx([values[rank - 1], values[-rank]], abs=1e-4)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_interval_of_few_is_students(count):
    logarithms = np.random.default_rng(count).normal(0.3, 0.1, count)
    expected = stats.ttest_1samp(logarithms, 0).confidence_interval(0.95)
    assert interval(np.exp(logarithms).tolist()) == pytest.approx(np.exp([expected.low, expected.high]), abs=1e-4)


@pytest.mark.parametrize("rounds", [3, 5, 9, 20])
def test_interval_covers(rounds):
    """95 % of the intervals should hold the true ratio; the bounds are four standard deviations of 1000 tries."""
    tries = np.random.default_rng(0).lognormal(np.log(1.5), 0.05, (1000, rounds))
    found = [interval(values.tolist()) for values in tries]
    covered = sum(low <= 1.5 <= high for low, high in filter(None, found)) / len(tries)
    assert 0.92 < covered < 0.995


@pytest.mark.parametrize("flag", ["--rounds", "--batches"])
def test_nothing_cannot_be_measured(flag):
    parser = flag_parser("loaders", "")
    add_turn_flags(parser)
    with pytest.raises(UserError, match=f"argument {flag}: 0 is not a whole number above 0"):
        parser.parse_args([flag, "0"])


def test_two_rounds_have_no_interval():
    rows = summarise({"ours": [100.0, 100.0], "theirs": [50.0, 50.0]}, times=("ours",))
    assert rows["theirs"]["times ours, 95 %"] is None
    assert ratio_text(rows["theirs"], "times ours") == "2.00 (2.00–2.00)"


def test_table():
    rates = {"ours": [1234.0, 1267.0, 1300.0], "theirs": [50.0, 50.0, 50.0]}
    title, _, head, line, ours, theirs = table("S=256", summarise(rates, times=("ours",)))
    assert (title, head, line) == ("S=256", "| | images/s | ours is … times |", "|---|---|---|")
    assert ours == "| ours | 1,267 (1,234–1,300) |  |"
    assert theirs.startswith("| theirs | 50.0 (50.0–50.0) | 25.34 (24.68–26.00, 95 % ")
    *_, head, _, ours, theirs = table("", summarise(rates, of="ours"))
    assert head == "| | images/s | of ours's |"
    assert "| 1.000 (1.000–1.000, 95 % 1.000–1.000) |" in ours
    assert "| 0.039 (0.038–0.041, 95 % " in theirs
