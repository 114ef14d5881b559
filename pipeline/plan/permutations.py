"""The two orders in which an epoch can show the images, both pure functions of (seed, epoch)."""

import functools
from typing import NamedTuple

import numpy as np

from pipeline.plan import random_numbers


class GlobalOrder:
    """A random permutation of all rows: for storage that is read at random places as fast as from end to end."""

    def __init__(self, length: int, seed: int) -> None:
        self._length, self._seed = length, seed

    def rows(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The rows at these positions (int64 [n] in [0, length)) of these epochs (int64 [n]): int64 [n]."""
        return random_numbers.order(positions, epochs, self._length, self._seed)


class _Layout(NamedTuple):
    """How the shards follow each other in one epoch."""

    shards: np.ndarray
    """int64 [shards]: the shard at each place."""
    shard_ends: np.ndarray
    """int64 [shards]: the position in the epoch before which the shard at each place ends."""
    window_ends: np.ndarray
    """int64 [windows]"""


class WindowOrder:
    """The shards in random order, then the images of so many consecutive ones in random order: for sequential reading.

    A window's shards are read from end to end, once an epoch, and what is in memory at a time is one window and the next.
    The shuffle is as good as a window is long: the images of a shard are a random sample of the data set already
    (pipeline.prepare sees to that), so each window is one too.
    """

    def __init__(self, shard_images: np.ndarray, window_shards: int, seed: int) -> None:
        """shard_images: int64 [shards], the rows in each shard, which are numbered shard by shard."""
        self._shard_images, self._window_shards, self._seed = shard_images, window_shards, seed
        self._first_rows = np.cumsum(shard_images) - shard_images
        self._windows = -(-len(shard_images) // window_shards)
        self._layout = functools.lru_cache(maxsize=4)(self._make_layout)

    def rows(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The rows at these positions (int64 [n] in [0, length)) of these epochs (int64 [n]): int64 [n]."""
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # one, or two at an epoch's end
            chosen = np.flatnonzero(epochs == epoch)
            layout, places = self._layout(epoch), positions[chosen]
            windows = np.searchsorted(layout.window_ends, places, side="right")
            begins = np.where(windows > 0, layout.window_ends[windows - 1], 0)
            lengths = layout.window_ends[windows] - begins
            places = begins + random_numbers.order(places - begins, epochs[chosen], lengths, self._seed, stream=windows)
            nth = np.searchsorted(layout.shard_ends, places, side="right")
            shards = layout.shards[nth]
            rows[chosen] = self._first_rows[shards] + places - (layout.shard_ends[nth] - self._shard_images[shards])
        return rows

    def window(self, epoch: int, position: int) -> int:
        """The number of the window, over all epochs, that a position lies in."""
        return epoch * self._windows + int(np.searchsorted(self._layout(epoch).window_ends, position, side="right"))

    def _make_layout(self, epoch: int) -> _Layout:
        count = len(self._shard_images)
        shards = random_numbers.order(
            np.arange(count), np.full(count, epoch), count, self._seed, purpose=random_numbers.PURPOSE_SHARD_ORDER
        )
        shard_ends = np.cumsum(self._shard_images[shards])
        window_ends = shard_ends[np.minimum(np.arange(1, self._windows + 1) * self._window_shards, count) - 1]
        return _Layout(shards, shard_ends, window_ends)
