"""The orders of an epoch: each row once, a pure function of (seed, epoch); windows read few shards at a time."""

import numpy as np
import pytest
from scipy import stats

from pipeline.plan.permutations import GlobalOrder, WindowOrder

SIZES = {
    "equal": np.full(12, 50),
    "last one short": np.array([50] * 9 + [7]),
    "one shard": np.array([33]),
    "uneven, some empty": np.array([0, 13, 1, 0, 90, 17, 0, 40, 2]),
}


def epoch_of(order, length: int, epoch: int) -> np.ndarray:
    return order.rows(np.arange(length), np.full(length, epoch))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window_shards", [1, 3, 100])
def test_each_row_once_in_every_epoch(sizes, window_shards):
    length = int(sizes.sum())
    order = WindowOrder(sizes, window_shards, seed=3)
    for epoch in (0, 1, 12_345):
        assert np.array_equal(np.sort(epoch_of(order, length, epoch)), np.arange(length))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_positions_of_any_epochs_together_are_as_one_by_one(sizes):
    length = int(sizes.sum())
    order, again = WindowOrder(sizes, 3, seed=5), WindowOrder(sizes, 3, seed=5)
    generator = np.random.default_rng(0)
    positions, epochs = generator.integers(0, length, 300), generator.integers(0, 6, 300)
    together = order.rows(positions, epochs)
    for position, epoch, row in zip(positions, epochs, together, strict=True):
        assert again.rows(np.array([position]), np.array([epoch]))[0] == row


def test_a_window_holds_the_images_of_its_shards_and_no_others():
    sizes = np.array([10, 20, 30, 40, 50, 60, 70])
    order = WindowOrder(sizes, 3, seed=0)
    shard_of_row = np.repeat(np.arange(7), sizes)
    for epoch in (0, 1):
        rows = epoch_of(order, 280, epoch)
        groups = np.array([order.window(epoch, position) for position in range(280)])
        assert len(np.unique(groups)) == 3
        assert np.all(np.diff(groups) >= 0)
        seen = [set(shard_of_row[rows[groups == group]]) for group in np.unique(groups)]
        assert sorted(map(len, seen)) == [1, 3, 3]
        assert set.union(*seen) == set(range(7))
    assert not {order.window(0, p) for p in range(280)} & {order.window(1, p) for p in range(280)}


def test_epochs_and_seeds_differ():
    sizes = np.full(20, 30)
    orders = [epoch_of(WindowOrder(sizes, 4, seed), 600, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one in range(4):
        for other in range(one):
            assert (orders[one] == orders[other]).mean() < 0.02


@pytest.mark.seconds
def test_every_row_comes_equally_often_at_every_tenth_of_the_epoch():
    """Chi-square over where one row of each shard stands, and over which rows stand at one place, in 1500 epochs."""
    sizes = np.full(10, 8)
    order = WindowOrder(sizes, 2, seed=0)
    orders = np.stack([epoch_of(order, 80, epoch) for epoch in range(1500)])
    places = np.argsort(orders, axis=1)
    for row in range(3, 80, 8):
        assert stats.chisquare(np.bincount(places[:, row] // 8, minlength=10)).pvalue > 1e-4
    for position in (0, 17, 79):
        assert stats.chisquare(np.bincount(orders[:, position], minlength=80)).pvalue > 1e-4


def test_neighbours_in_a_shard_are_not_neighbours_in_the_epoch():
    order = WindowOrder(np.full(8, 500), 2, seed=1)
    rows = epoch_of(order, 4000, 0)
    for window in range(4):
        part = rows[window * 1000 : (window + 1) * 1000]
        assert abs(np.corrcoef(part[:-1], part[1:])[0, 1]) < 0.15
        assert (np.abs(np.diff(part)) == 1).mean() < 0.01


def test_the_global_order_is_the_same_bijection_for_lengths_one_by_one():
    """WindowOrder draws in windows of differing lengths at once: as drawing each alone."""
    from pipeline.plan import random_numbers

    lengths = np.array([1, 2, 3, 10, 1000, 1001])
    streams = np.arange(6)
    together = random_numbers.order(lengths - 1, np.full(6, 4), lengths, seed=9, stream=streams)
    for length, stream, row in zip(lengths, streams, together, strict=True):
        assert (
            random_numbers.order(np.array([length - 1]), np.array([4]), int(length), seed=9, stream=int(stream))[0]
            == row
        )
    assert np.array_equal(
        GlobalOrder(1000, 9).rows(np.arange(1000), np.zeros(1000, dtype=np.int64)),
        random_numbers.order(np.arange(1000), np.zeros(1000, dtype=np.int64), 1000, seed=9),
    )


def test_each_window_and_each_epoch_has_a_permutation_of_its_own():
    """One shard a window, all of one size: what stands where within each window."""
    order = WindowOrder(np.full(12, 50), 1, seed=7)
    permutations = []
    for epoch in (0, 1):
        windows = epoch_of(order, 600, epoch).reshape(12, 50)
        assert (np.ptp(windows // 50, axis=1) == 0).all(), "a window is a shard"
        permutations += list(windows % 50)
    for one in range(24):
        for other in range(one):
            assert (permutations[one] == permutations[other]).mean() < 0.3, (one, other)


def test_the_shards_come_in_another_order_in_every_epoch():
    order = WindowOrder(np.full(40, 2), 1, seed=7)
    shards = [epoch_of(order, 80, epoch)[::2] // 2 for epoch in range(4)]
    for one in range(4):
        for other in range(one):
            assert (shards[one] == shards[other]).mean() < 0.3, (one, other)
    # Forty images of a global order and forty shards are permuted by different random numbers.
    rows = GlobalOrder(40, 7).rows(np.arange(40), np.zeros(40, dtype=np.int64))
    assert (rows == shards[0]).mean() < 0.3
