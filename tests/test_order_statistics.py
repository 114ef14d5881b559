import numpy as np
import pytest
from scipy.stats import binom

from perf.order_statistics import median_interval, summarise


@pytest.mark.parametrize("count", [*range(1, 60), 100, 999, 1000, 1001, 5000, 20_000])
def test_the_interval_is_the_narrowest_that_has_95_percent(count):
    """Its ranks are those of the binomial distribution's quantile; above 1000 values, to one."""
    interval = median_interval(np.arange(1, count + 1))
    k = int(binom.ppf(0.025, count, 0.5))  # fewer than k heads have at most 2.5 %
    assert binom.cdf(k - 1, count, 0.5) <= 0.025 < binom.cdf(k, count, 0.5)
    if k == 0:
        assert interval is None
        assert count < 6
        return
    assert interval is not None
    low, high = interval
    assert low == pytest.approx(k, abs=int(count > 1000))
    assert high == count + 1 - low


def test_the_interval_holds_the_median_of_a_skewed_distribution():
    generator = np.random.default_rng(0)
    samples = generator.exponential(size=(4000, 40))
    hits = 0
    for sample in samples:
        low, high = median_interval(sample) or (0, 0)
        hits += low <= np.log(2) <= high
    exact = 1 - 2 * binom.cdf(13, 40, 0.5)  # between the 14th and the 27th of 40
    assert hits / len(samples) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / len(samples)))


def test_a_summary():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
    summary = summarise(values)
    assert summary["count"] == 6
    assert summary["median"] == 3.5
    assert summary["p5"] == pytest.approx(np.quantile(values, 0.05))
    assert summary["p95"] == pytest.approx(np.quantile(values, 0.95))
    assert summary["relative_ci"] == pytest.approx((9 - 1) / 2 / 3.5), "of six values, the interval is all of them"


def test_what_cannot_be_known_is_none():
    assert summarise([2.0] * 5)["relative_ci"] is None
    assert summarise([0.0] * 30)["relative_ci"] is None
    assert summarise([2.0] * 6)["relative_ci"] == 0
