"""The plan of a training: everything random about a sample, decided in NumPy before DALI runs, as a pure function of its number.

Training samples are numbered g = 0, 1, 2, … without end: epoch = g div N, row = order(epoch)[g mod N], and the crop, the
flip and the colour shift are draws at (seed, epoch, row). A global batch is B consecutive samples; it
may straddle two epochs, so that every image is used exactly once an epoch for any N and B, and every batch is full.
Rank r of n takes the r-th n-th of each batch. The only state is one integer, the number of samples seen.

Where an image turns out not to be decodable, the plan is asked again from the same sample on, without it.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.dataset.table import Table
from pipeline.plan import random_numbers
from pipeline.plan.permutations import GlobalOrder, WindowOrder
from pipeline.plan.samples import IMAGENET_MEAN_RGB, Samples, rescaled_sizes, resized_windows, source_windows
from pipeline.shards.shard_table import ShardTable

# Eigenvectors (columns) and eigenvalues of ImageNet's RGB values, as MXNet (image.py) and, divided by 255, fb.resnet.torch
# (datasets/imagenet.lua) publish them.
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_EIGENVALUES = (55.46, 4.794, 1.148)

ColourShift = tuple[tuple[float, float, float], ...]
"""The matrix P·diag(λ) of AlexNet's colour shift, which makes three normal draws a shift of R, G, B (0–255).

P has the eigenvectors of the training pixels' RGB covariance as its columns, λ the eigenvalues. A covariance has the square
of the pixels' unit: the published figures, and so AlexNet's σ = 0.1, are for pixels in 0–1, and the shift is then in 0–1 too.
"""
IMAGENET_COLOUR_SHIFT: ColourShift = tuple(
    (p * _EIGENVALUES[0], q * _EIGENVALUES[1], r * _EIGENVALUES[2]) for p, q, r in _EIGENVECTORS
)
_COLOUR_SHIFT_SIGMA = 0.1  # section 3.1 of the paper, after AlexNet

_TRIES = 10  # at a random-resized crop that fits into the image

# Samples planned in one go: a vectorised draw costs about 10 µs for each 64 samples at this size, 300 µs at 64.
_SAMPLES_A_BLOCK = 4096


class RandomResized(NamedTuple):
    """Crops as torchvision's RandomResizedCrop takes them: of a random size and shape, resized to the network's input.

    Inception's augmentation: Szegedy et al. 2015, "Going deeper with convolutions", section 6.
    """

    area: tuple[float, float] = (0.08, 1.0)
    """Lowest and highest share of the image's area, from which one is drawn."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest width / height, from which one is drawn, its logarithm being uniform."""

    def rectangles(
        self, sizes: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First pixel (y, x) and size of the crop of each image, whose sizes are int64 [n, 2]: int64 [n, 2], int64 [n, 2].

        As in torchvision, sides are rounded to pixels, and what does not fit is drawn again, ten times at most; after that, it is
        the largest rectangle at the image's centre whose aspect is allowed.
        """
        low, high = self.aspect
        height, width = sizes.T
        shapes = np.stack((np.rint(np.minimum(height, width / low)), np.rint(np.minimum(width, height * high))), axis=1)
        shapes = np.maximum(shapes, 1).astype(np.int64)
        corners = (sizes - shapes) // 2
        left = np.arange(len(rows))
        for attempt in range(_TRIES):
            purpose = random_numbers.PURPOSE_CROP + attempt
            u_area, u_aspect, u_y, u_x = random_numbers.uniforms(seed, epochs[left], rows[left], purpose)
            area = sizes[left].prod(axis=1) * (self.area[0] + u_area * (self.area[1] - self.area[0]))
            aspect = low * (high / low) ** u_aspect
            drawn = np.rint(np.sqrt(np.stack((area / aspect, area * aspect), axis=1))).astype(np.int64)
            room = sizes[left] - drawn
            fits = ((drawn > 0) & (room >= 0)).all(axis=1)
            places = np.minimum(np.floor(np.stack((u_y, u_x), axis=1) * (room + 1)).astype(np.int64), room)
            shapes[left[fits]], corners[left[fits]] = drawn[fits], places[fits]
            left = left[~fits]
        return corners, shapes


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The endless sequence of training samples over a table (section 3.1 of the paper)."""

    table: Table
    batch_size: int
    """Images in a global batch, over all ranks."""
    crop: int
    """Side of the square network input in pixels."""
    scale: tuple[int, int]
    """Lowest and highest training scale S, both included; S is the shorter side after the rescale, at least `crop`."""
    seed: int
    random_resized: RandomResized | None = None
    """How the crops are drawn where it is not as in the paper; `scale` then has no meaning."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB
    colour_shift: ColourShift = IMAGENET_COLOUR_SHIFT
    window_shards: int | None = None
    """Shards of a ShardTable that are shuffled together (WindowOrder); None for a permutation of all images."""
    lost_rows: set[int] = field(default_factory=set)
    """Rows found so far of which nothing can be decoded; others are shown in their place."""
    lost_samples: set[tuple[int, int]] = field(default_factory=set)
    """(sample number, row) found so far where the sample's window of the row cannot be decoded: of a cut file, say."""

    @functools.cached_property
    def _order(self) -> GlobalOrder | WindowOrder:
        if self.window_shards is None:
            return GlobalOrder(len(self.table), self.seed)
        assert isinstance(self.table, ShardTable)
        return WindowOrder(self.table.shard_images, self.window_shards, self.seed)

    def epochs_and_rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (int64 [n]) → the epoch and the table's row of each (int64 [n], int64 [n])."""
        epochs, positions = np.divmod(numbers, len(self.table))
        return epochs, self._order.rows(positions, epochs)

    @property
    def read_group(self) -> Callable[[Samples], int] | None:
        """What is equal for consecutive batches that are best read together, of one window of shards; None: nothing."""
        order = self._order
        if isinstance(order, GlobalOrder):
            return None
        return lambda samples: order.window(*divmod(int(samples.numbers[0]), len(self.table)))

    def samples(self, numbers: np.ndarray) -> Samples:
        """All decisions about the samples with these numbers (int64 [n])."""
        epochs, rows = self.epochs_and_rows(numbers)
        shown = self._substituted(numbers, epochs, rows)
        source, labels, sizes = self.table.read(shown)
        u_scale, u_y, u_x, u_flip = random_numbers.uniforms(self.seed, epochs, rows, random_numbers.PURPOSE_GEOMETRY)
        flipped = u_flip >= 0.5
        if self.random_resized:
            corners, shapes = self.random_resized.rectangles(sizes, self.seed, epochs, rows)
            windows = resized_windows(corners, shapes, self.crop, flipped)
        else:
            rescaled = rescaled_sizes(sizes, self._scales(u_scale))
            room = rescaled - self.crop
            corners = np.minimum(np.floor(np.stack((u_y, u_x), axis=1) * (room + 1)).astype(np.int64), room)
            windows = source_windows(sizes, rescaled, corners, self.crop, flipped)
        alpha = _COLOUR_SHIFT_SIGMA * random_numbers.normals(self.seed, epochs, rows, random_numbers.PURPOSE_COLOUR)
        shift = np.asarray(self.colour_shift) @ alpha
        return Samples(
            source=source,
            **windows,
            mean=(np.asarray(self.mean_rgb) - shift.T).astype(np.float32, order="C"),
            labels=labels,
            numbers=numbers,
            rows=shown,
        )

    def scales(self, numbers: np.ndarray) -> np.ndarray:
        """The training scale S of the samples with these numbers (int64 [n]), in pixels: int64 [n]."""
        return self._scales(
            random_numbers.uniforms(self.seed, *self.epochs_and_rows(numbers), random_numbers.PURPOSE_GEOMETRY)[0]
        )

    def _scales(self, u: np.ndarray) -> np.ndarray:
        lowest, highest = self.scale
        return lowest + np.floor(u * (highest - lowest + 1)).astype(np.int64)

    def lose(self, samples: Samples, dead: np.ndarray) -> None:
        """From now on, show others in place of these samples; of rows that are dead (bool [n]), wherever they occur."""
        self.lost_rows.update(samples.rows[dead].tolist())
        self.lost_samples.update(zip(samples.numbers[~dead].tolist(), samples.rows[~dead].tolist(), strict=True))

    def batches(self, *, start: int, rank: int, world_size: int, micro_batch: int, skip: int = 0) -> Iterator[Samples]:
        """This rank's micro-batches from sample number `start` on, less the first `skip` of them, without end.

        batch_size must be a multiple of world_size · micro_batch: consecutive micro-batches make up the rank's share.
        """
        share = self.batch_size // world_size
        skipped_steps, skipped_of_share = divmod(skip * micro_batch, share)
        start += skipped_steps * self.batch_size
        steps_a_block = max(1, _SAMPLES_A_BLOCK // share)
        within_block = np.arange(steps_a_block)[:, None] * self.batch_size + rank * share + np.arange(share)
        while True:
            block = self.samples((start + within_block).ravel())
            for first in range(skipped_of_share, len(block.labels), micro_batch):
                yield block.take(slice(first, first + micro_batch))
            start += steps_a_block * self.batch_size
            skipped_of_share = 0

    def _substituted(self, numbers: np.ndarray, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The rows, with the first of a random sequence of others that can be decoded in place of each lost one.

        The sequence is a function of (seed, epoch, row), and whether a sample can be decoded is one of its window and file.
        So what is shown in the end does not depend on which losses this rank has met before: it meets the others itself.
        """
        shown, attempt = rows.copy(), 0
        while len(hits := np.flatnonzero(self._is_lost(numbers, shown))):
            purpose = random_numbers.PURPOSE_SUBSTITUTE + attempt
            u = random_numbers.uniforms(self.seed, epochs[hits], rows[hits], purpose)[0]
            shown[hits] = (u * len(self.table)).astype(np.int64)
            attempt += 1
        return shown

    def _is_lost(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        lost = np.isin(rows, list(self.lost_rows))
        candidates = np.flatnonzero(np.isin(numbers, [number for number, _ in self.lost_samples]))
        for index in candidates:  # few: losses within the samples at hand
            lost[index] |= (int(numbers[index]), int(rows[index])) in self.lost_samples
        return lost
