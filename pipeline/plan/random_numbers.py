"""Random numbers and random orders that are pure functions of their coordinates.

Nothing here has state. A draw is Philox4x32-10 at (seed, epoch, row, purpose); the order of an epoch is a keyed
bijection of the row numbers, evaluated at the positions asked for. So any batch of any epoch is computed from nothing:
resume, start-up and memory do not grow with the data set.

Source of Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW32, _SHIFT32 = np.uint64(0xFFFFFFFF), np.uint64(32)

# The last counter word says what a number is for, so that no two purposes ever share one.
PURPOSE_GEOMETRY = 0  # scale, crop corner (y, x), flip
PURPOSE_COLOUR = 1  # the three normals of the colour shift
PURPOSE_MIXING = 2  # mixup or CutMix, share, rectangle (y, x); its row is the number of a sample
PURPOSE_CROP = 0x20  # + try: area, aspect, corner (y, x) of a random-resized crop
PURPOSE_ORDER = 0x100  # + round
PURPOSE_SHARD_ORDER = 0x110  # + round
PURPOSE_PACKING = 0x120  # + round
PURPOSE_SUBSTITUTE = 0x200  # + attempt

_FEISTEL_ROUNDS = 6


def philox4x32(counter: tuple, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 on arrays.

    counter: four words, each an integer or an integer array in [0, 2³²), broadcast against each other; key: two words.
    Returns uint64 [4, …], each value below 2³² (64 bits wide so that callers can multiply without a cast).
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT32) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW32,
            (product_0 >> _SHIFT32) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW32,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def uniforms(seed: int, epochs: np.ndarray, rows: np.ndarray, purpose: int) -> np.ndarray:
    """Four uniform numbers in [0, 1) for each (epoch, row): float64 [4, n]."""
    return _words(seed, epochs, rows, purpose) * 2.0**-32


def normals(seed: int, epochs: np.ndarray, rows: np.ndarray, purpose: int) -> np.ndarray:
    """Three standard normal numbers for each (epoch, row): float64 [3, n], by the Box-Muller transform."""
    u = (_words(seed, epochs, rows, purpose) + 0.5) * 2.0**-32  # the half keeps the logarithm finite
    radius = np.sqrt(-2.0 * np.log(u[:2]))
    angle = 2.0 * np.pi * u[2:]
    return np.stack((radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])))


def order(
    positions: np.ndarray,
    epochs: np.ndarray,
    length: int | np.ndarray,
    seed: int,
    *,
    stream: int | np.ndarray = 0,
    purpose: int = PURPOSE_ORDER,
) -> np.ndarray:
    """The rows that stand at these positions of these epochs' random orders.

    positions: int64 [n] in [0, length); epochs: int64 [n]; length and stream: one for all, or int64 [n]. Returns int64 [n] in
    [0, length). For each (epoch, stream, purpose) this is a bijection of [0, length): a six-round Feistel network over
    Z_a × Z_a with a = ⌈√length⌉ and Philox as its round function. The domain a² exceeds the length by at most 2√length, so
    the few values that fall outside walk on (Black & Rogaway 2002, "Ciphers with arbitrary finite domains") and end after a
    step or two.
    """
    shape = np.shape(positions)
    epochs, lengths, streams = (np.asarray(value, dtype=np.uint64) for value in (epochs, length, stream))
    # The root of a number below 2⁵² is exact enough for its floor; no data set is longer.
    sides = np.floor(np.sqrt(lengths - np.uint64(1))).astype(np.uint64) + np.uint64(1)
    rows = _feistel(np.asarray(positions, dtype=np.uint64), epochs, sides, streams, purpose, seed)
    while len(outside := np.flatnonzero(rows >= lengths)):
        some_epochs, some_sides, some_streams = (
            np.broadcast_to(value, shape)[outside] for value in (epochs, sides, streams)
        )
        rows[outside] = _feistel(rows[outside], some_epochs, some_sides, some_streams, purpose, seed)
    return rows.astype(np.int64)


def _feistel(
    values: np.ndarray, epochs: np.ndarray, sides: np.ndarray, streams: np.ndarray, purpose: int, seed: int
) -> np.ndarray:
    left, right = values // sides, values % sides
    key = _key(seed)
    for round_number in range(_FEISTEL_ROUNDS):
        # sides < 2³¹ for any data set, so the word times the side fits 64 bits, and the high half is uniform in [0, side).
        word = philox4x32((right, streams, epochs, purpose + round_number), key)[0]
        left, right = right, (left + ((word * sides) >> _SHIFT32)) % sides
    return left * sides + right


def _words(seed: int, epochs: np.ndarray, rows: np.ndarray, purpose: int) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.uint64)
    return philox4x32((rows & _LOW32, rows >> _SHIFT32, epochs, purpose), _key(seed))


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
