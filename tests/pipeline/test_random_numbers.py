import numpy as np
import pytest
from scipy import stats

from pipeline.plan import random_numbers

# A p-value below this in a fixed-seed test of good random numbers would be a find of one in ten thousand.
SIGNIFICANCE = 1e-4


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word, expected):
    assert tuple(random_numbers.philox4x32((word,) * 4, (word,) * 2).ravel()) == expected


def test_philox_gives_the_known_answer_for_the_digits_of_pi():
    # Random123's third known answer: words of pi as counter and key, all different.
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert tuple(random_numbers.philox4x32(counter, key).ravel()) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 360, 1437, 65_537, 99_999])
@pytest.mark.parametrize("epoch", [0, 7])
def test_order_is_a_bijection(length, epoch):
    positions = np.arange(length)
    rows = random_numbers.order(positions, np.full(length, epoch), length, seed=3)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), positions)


def test_order_of_some_positions_is_part_of_the_whole_order():
    length, epochs = 10_007, np.full(10_007, 5)
    whole = random_numbers.order(np.arange(length), epochs, length, seed=11)
    some = np.array([9_999, 3, 3, 4_711])
    assert np.array_equal(random_numbers.order(some, np.full(4, 5), length, seed=11), whole[some])


def test_order_works_beyond_32_bits():
    length = 10**10
    rows = random_numbers.order(np.arange(length - 1000, length), np.zeros(1000, dtype=int), length, seed=0)
    assert len(np.unique(rows)) == 1000
    assert rows.min() >= 0
    assert rows.max() < length


def test_order_is_uniform_over_epochs():
    """Every row is equally likely at every position: chi-square over (position, row) of a small table, many epochs."""
    length, epochs = 12, 12_000
    positions = np.tile(np.arange(length), epochs)
    rows = random_numbers.order(positions, np.repeat(np.arange(epochs), length), length, seed=1)
    counts = np.zeros((length, length))
    np.add.at(counts, (positions, rows), 1)
    statistic = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
    assert stats.chi2.sf(statistic, (length - 1) ** 2) > SIGNIFICANCE


def test_order_gives_all_permutations_of_a_small_table_equally_often():
    epochs = 24_000
    rows = random_numbers.order(np.tile(np.arange(4), epochs), np.repeat(np.arange(epochs), 4), 4, seed=9).reshape(
        epochs, 4
    )
    _, counts = np.unique(rows @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_neighbours_epochs_and_seeds_are_uncorrelated(seeds):
    length = 50_000
    one = random_numbers.order(np.arange(length), np.full(length, 0), length, seeds[0])
    other = random_numbers.order(np.arange(length), np.full(length, 1), length, seeds[1])
    bound = stats.norm.isf(SIGNIFICANCE) / np.sqrt(length)
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < bound, "serial"
    assert abs(np.corrcoef(one, np.arange(length))[0, 1]) < bound, "with the position"
    assert abs(np.corrcoef(one, other)[0, 1]) < bound, "between epochs"


def test_uniforms_and_normals_have_the_distribution_of_numpys_generators():
    count, generator = 100_000, np.random.default_rng(0)
    epochs, rows = np.zeros(count, dtype=int), np.arange(count)
    uniforms = random_numbers.uniforms(5, epochs, rows, random_numbers.PURPOSE_GEOMETRY)
    normals = random_numbers.normals(5, epochs, rows, random_numbers.PURPOSE_COLOUR)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    for sample in uniforms:
        assert stats.ks_2samp(sample, generator.random(count)).pvalue > SIGNIFICANCE
    for sample in normals:
        assert stats.ks_2samp(sample, generator.standard_normal(count)).pvalue > SIGNIFICANCE
    correlations = np.corrcoef(np.concatenate((uniforms, normals)))
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(off_diagonal).max() < stats.norm.isf(SIGNIFICANCE / len(off_diagonal)) / np.sqrt(count)


def test_draws_depend_on_every_coordinate():
    one = random_numbers.uniforms(1, np.array([2]), np.array([3]), random_numbers.PURPOSE_GEOMETRY)
    for other in (
        random_numbers.uniforms(2, np.array([2]), np.array([3]), random_numbers.PURPOSE_GEOMETRY),
        random_numbers.uniforms(1 + (1 << 32), np.array([2]), np.array([3]), random_numbers.PURPOSE_GEOMETRY),
        random_numbers.uniforms(1, np.array([3]), np.array([3]), random_numbers.PURPOSE_GEOMETRY),
        random_numbers.uniforms(1, np.array([2]), np.array([3 + (1 << 32)]), random_numbers.PURPOSE_GEOMETRY),
        random_numbers.uniforms(1, np.array([2]), np.array([3]), random_numbers.PURPOSE_COLOUR),
    ):
        assert not np.any(one == other)


def test_uniforms_are_the_four_words_of_philox_in_units_of_two_to_the_32():
    """A row beyond 32 bits has its high half in a word of its own, and so has the seed."""
    seed, row, epoch = 5 + (7 << 32), 3 + (9 << 32), 2
    words = random_numbers.philox4x32((3, 9, epoch, random_numbers.PURPOSE_COLOUR), (5, 7))
    found = random_numbers.uniforms(seed, np.array([epoch]), np.array([row]), random_numbers.PURPOSE_COLOUR)
    assert np.array_equal(found[:, 0], words.astype(float) / 2**32)


def test_normals_share_nothing_by_pairs_nor_all_together():
    """Two that share a radius or an angle are uncorrelated, but their squares are not: with n = 100 000 those of independent
    normals have a correlation of 0 ± 0.003, of ones with the same radius 1/8 and more."""
    count = 100_000
    squares = (
        random_numbers.normals(11, np.zeros(count, dtype=int), np.arange(count), random_numbers.PURPOSE_COLOUR) ** 2
    )
    off_diagonal = np.corrcoef(squares)[~np.eye(3, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.02
    # Of three independent ones, the sum of squares has chi-square's distribution with three degrees of freedom.
    assert stats.kstest(squares.sum(axis=0), stats.chi2(3).cdf).pvalue > SIGNIFICANCE


def test_no_two_purposes_ever_have_a_counter_in_common():
    """An order takes a counter for each round, substitutes one for each attempt, of which there is no end."""
    purposes = {name: value for name, value in vars(random_numbers).items() if name.startswith("PURPOSE_")}
    last = purposes.pop("PURPOSE_SUBSTITUTE")
    counters: list[int] = []
    for name, purpose in purposes.items():
        rounds = random_numbers._FEISTEL_ROUNDS if "ORDER" in name or "PACKING" in name else 1
        counters += range(purpose, purpose + rounds)
    assert len(counters) > len(purposes)
    assert len(set(counters)) == len(counters)
    assert max(counters) < last


@pytest.mark.parametrize("length", [5, 40])
def test_an_order_depends_on_epoch_seed_stream_and_purpose(length):
    def order(epoch=1, seed=2, **others):
        return random_numbers.order(np.arange(length), np.full(length, epoch), length, seed, **others)

    variants = [order(), order(epoch=3), order(seed=3), order(seed=2 + (1 << 32)), order(stream=1)]
    variants += [order(purpose=random_numbers.PURPOSE_SHARD_ORDER), order(purpose=random_numbers.PURPOSE_PACKING)]
    for one in range(len(variants)):
        for other in range(one):
            assert not np.array_equal(variants[one], variants[other]), (one, other)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_rarest_words_give_numbers_too(monkeypatch, word):
    """Once in four billion draws: a logarithm of 0, or of more than 1, would be no number."""
    monkeypatch.setattr(random_numbers, "_words", lambda *_: np.full((4, 1), word, dtype=np.uint64))
    where = 0, np.array([0]), np.array([0]), random_numbers.PURPOSE_GEOMETRY
    assert np.isfinite(random_numbers.normals(*where)).all()
    u = random_numbers.uniforms(*where)
    assert (u >= 0).all()
    assert (u < 1).all()
