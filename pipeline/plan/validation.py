"""The plan of a validation during training: the centre crop of every image."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.dataset.table import Table
from pipeline.plan.samples import IMAGENET_MEAN_RGB, LOST_LABEL, PADDING_LABEL, Samples, rescaled_sizes, source_windows


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """Every image of a table once: rescaled to S, centre crop, no flip, no shift. The last batch is padded."""

    table: Table
    crop: int
    scale: int
    """Shorter side after the rescale, at least `crop`."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB
    lost_rows: set[int] = field(default_factory=set)
    """Rows found so far whose window cannot be decoded: some other image is shown, under LOST_LABEL."""

    def steps(self, *, world_size: int, batch_size: int) -> int:
        """Batches of `batch_size` that each rank takes in one pass."""
        return -(-len(self.table) // (world_size * batch_size))

    def batches(self, *, rank: int, world_size: int, batch_size: int, skip: int = 0) -> Iterator[Samples]:
        """This rank's batches less the first `skip`, pass after pass without end: a loader prefetches across passes."""
        steps = self.steps(world_size=world_size, batch_size=batch_size)
        while True:
            for step in range(skip % steps, steps):
                first = (step * world_size + rank) * batch_size
                yield self.samples(np.arange(first, first + batch_size))
            skip = 0

    def lose(self, samples: Samples, dead: np.ndarray) -> None:
        """From now on, count these images as lost; dead or not, their window is the same in every pass."""
        self.lost_rows.update(samples.rows.tolist())

    @property
    def read_group(self) -> None:
        """Each batch is read by itself: neighbours in the table lie side by side in the shards anyway."""

    def samples(self, rows: np.ndarray) -> Samples:
        """These rows (int64 [n]); those behind the table's last are padding."""
        own_rows = np.minimum(rows, len(self.table) - 1)
        shown = own_rows.copy()
        while len(hits := np.flatnonzero(np.isin(shown, list(self.lost_rows)))):
            shown[hits] = (shown[hits] + 1) % len(self.table)
        source, labels, sizes = self.table.read(shown)
        labels = np.where(shown == own_rows, labels, LOST_LABEL)
        rescaled = rescaled_sizes(sizes, np.full(len(rows), self.scale))
        # Halves round to even, as torchvision's center_crop does.
        corners = np.rint((rescaled - self.crop) / 2).astype(np.int64)
        return Samples(
            source=source,
            **source_windows(sizes, rescaled, corners, self.crop, flipped=np.zeros(len(rows), dtype=bool)),
            mean=np.tile(np.asarray(self.mean_rgb, dtype=np.float32), (len(rows), 1)),
            labels=np.where(rows < len(self.table), labels, PADDING_LABEL),
            numbers=rows,
            rows=shown,
        )
