"""The plan of a test: every image of a table once, whole, in batches of images that have one size after the rescale.

Which images make up a batch depends on the table alone, and the batches go round among the ranks. So every image is
computed together with the same others whatever the number of ranks, and comes out the same to the last bit.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.dataset.table import Table
from pipeline.plan.samples import Samples, rescaled_sizes, source_windows

_ROWS_A_BLOCK = 65536  # of the table, read in one go
_MOST_PIXELS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """Every image of a table, its shorter side rescaled to Q, not cropped (section 3.2 of the paper); largest images first.

    The batches' labels are the rows' numbers, for the results to be put in place by. Images of which the rescale would make
    more than most_pixels are in no batch: one of 1×60000 pixels at Q = 36 has 78 million, for which a network needs 20 GB.
    """

    table: Table
    scale: int
    """Q: the shorter side after the rescale, in pixels."""
    pixels: int
    """Most pixels of a batch's images together, unless it is a single image."""
    mean_rgb: tuple[float, float, float]
    lost_rows: set[int] = field(default_factory=set)
    """Rows found so far that cannot be decoded; they are in no batch."""

    @property
    def largest_batch(self) -> int:
        """Images in the largest batch; 1 where there is none."""
        return max((len(rows) for rows in self._batches), default=1)

    @property
    def most_pixels(self) -> int:
        """An image may have this many after the rescale: 4,194,304, or those of four squares of side Q where they are more.

        So an image may be 64 times as long as it is high at Q = 256, and 16 times at 512.
        """
        return max(_MOST_PIXELS, 4 * self.scale**2)

    @functools.cached_property
    def too_large(self) -> np.ndarray:
        """The rows (int64 [n]) that are in no batch because they would have more than most_pixels."""
        return np.flatnonzero(self._sizes.prod(axis=1) > self.most_pixels)

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of a row's image after the rescale."""
        height, width = self._sizes[row].tolist()
        return height, width

    def images(self, *, rank: int, world_size: int) -> int:
        """Images in all batches of this rank."""
        return sum(len(rows) for rows in self._batches[rank::world_size])

    def batches(self, *, rank: int, world_size: int, skip: int = 0) -> Iterator[Samples]:
        """This rank's batches less the first `skip`. A batch of which every image is lost is none."""
        for rows in self._batches[rank::world_size]:
            if self.lost_rows:
                rows = rows[~np.isin(rows, list(self.lost_rows))]
            if len(rows) and skip:
                skip -= 1
            elif len(rows):
                yield self._samples(rows)

    def lose(self, samples: Samples, dead: np.ndarray) -> None:
        """From now on, leave these images out; dead or not, all of each is needed."""
        self.lost_rows.update(samples.rows.tolist())

    @property
    def read_group(self) -> None:
        """Each batch is read by itself."""

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Of all rows after the rescale: int64 [rows, 2]."""
        blocks = (
            np.arange(first, min(first + _ROWS_A_BLOCK, len(self.table)))
            for first in range(0, len(self.table), _ROWS_A_BLOCK)
        )
        return np.concatenate([self._rescaled(self.table.read(rows).sizes) for rows in blocks])

    @functools.cached_property
    def _batches(self) -> list[np.ndarray]:
        """The rows (int64 [n]) of each batch, of all ranks."""
        sizes = self._sizes
        # Largest first: memory that is too small shows at once, and no rank is left with a large batch at the end.
        order = np.lexsort((sizes[:, 0], -sizes.prod(axis=1)))[len(self.too_large) :]
        edges = np.flatnonzero(np.diff(sizes[order], axis=0).any(axis=1)) + 1
        batches = []
        for rows in np.split(order, edges) if len(order) else []:
            most = max(1, self.pixels // int(sizes[rows[0]].prod()))
            batches += [rows[first : first + most] for first in range(0, len(rows), most)]
        return batches

    def _rescaled(self, sizes: np.ndarray) -> np.ndarray:
        return rescaled_sizes(sizes, np.full(len(sizes), self.scale))

    def _samples(self, rows: np.ndarray) -> Samples:
        source, _, sizes = self.table.read(rows)
        rescaled = self._rescaled(sizes)
        nothing = np.zeros(len(rows), dtype=bool)
        return Samples(
            source=source,
            **source_windows(sizes, rescaled, np.zeros_like(sizes), rescaled, flipped=nothing),
            mean=np.tile(np.asarray(self.mean_rgb, dtype=np.float32), (len(rows), 1)),
            labels=rows,
            numbers=rows,
            rows=rows,
        )
