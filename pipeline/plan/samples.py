"""The plan: everything random about a sample, decided in NumPy before DALI runs, as a pure function of its number.

Training samples are numbered g = 0, 1, 2, … without end: epoch = g div N, row = order(epoch)[g mod N], and the scale, the
crop's corner, the flip and the colour shift are draws at (seed, epoch, row). A global batch is B consecutive samples; it
may straddle two epochs, so that every image is used exactly once an epoch for any N and B, and every batch is full.
Rank r of n takes the r-th n-th of each batch. The only state is one integer, the number of samples seen.

Where an image turns out not to be decodable, the plan is asked again from the same sample on, without it.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.dataset.table import ShardTable, Table
from pipeline.plan import random_numbers
from pipeline.plan.permutations import GlobalOrder, WindowOrder

IMAGENET_MEAN_RGB = (123.68, 116.779, 103.939)
"""Mean of ImageNet's training pixels, 0–255, as in the paper authors' released models."""

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

# Samples planned in one go: a vectorised draw costs about 10 µs for each 64 samples at this size, 300 µs at 64.
_SAMPLES_A_BLOCK = 4096

PADDING_LABEL = -1
"""Label of the rows that fill up the last validation batch; they count for nothing."""
LOST_LABEL = -2
"""Label of validation images that cannot be decoded; they count as wrong."""


class Samples(NamedTuple):
    """What the DALI graph and the loss need to know of n samples. y comes before x everywhere."""

    source: np.ndarray
    """[n, …]: where the images' bytes lie, as the kind of table has it."""
    start: np.ndarray
    """int32 [n, 2]: first pixel of the source window that is decoded."""
    shape: np.ndarray
    """int32 [n, 2]: size of that window."""
    roi_start: np.ndarray
    """float32 [n, 2]: where the crop begins, in pixels of the decoded window (fractional)."""
    roi_end: np.ndarray
    """float32 [n, 2]: where it ends; in x before it begins, for a resized image that is flipped horizontally."""
    resized: np.ndarray
    """bool [n]: False where the window is the crop itself, because the image has the right size already."""
    mirrored: np.ndarray
    """int32 [n]: 1 where an image that is not resized is flipped horizontally."""
    size: np.ndarray
    """float32 [n, 2]: height and width of what comes out: of the crop, or of the whole rescaled image."""
    mean: np.ndarray
    """float32 [n, 3]: what is subtracted from R, G, B (0–255): the data set's mean less the sample's colour shift."""
    labels: np.ndarray
    """int64 [n]"""
    numbers: np.ndarray
    """int64 [n]: the samples' numbers in their plan."""
    rows: np.ndarray
    """int64 [n]: the table's row that each sample shows."""

    def inputs(self) -> tuple[np.ndarray, ...]:
        """What the DALI graph takes besides the images' bytes, in the order of GRAPH_INPUTS."""
        return tuple(getattr(self, name) for name in GRAPH_INPUTS)

    def first_pixels(self) -> "Samples":
        """The same files, but the window is their first pixel: where that cannot be decoded, nothing can."""
        none, one = np.zeros_like(self.start), np.ones_like(self.start)
        return self._replace(
            start=none,
            shape=one,
            roi_start=none.astype(np.float32),
            roi_end=one.astype(np.float32),
            resized=np.ones_like(self.resized),
        )

    def take(self, which: slice | list[int]) -> "Samples":
        return Samples(*(field[which] for field in self))

    @property
    def flipped(self) -> np.ndarray:
        """bool [n]"""
        return (self.roi_end[..., 1] < self.roi_start[..., 1]) | (self.mirrored == 1)


GRAPH_INPUTS = {
    "start": np.int32,
    "shape": np.int32,
    "roi_start": np.float32,
    "roi_end": np.float32,
    "resized": np.bool_,
    "mirrored": np.int32,
    "size": np.float32,
    "mean": np.float32,
    "labels": np.int64,
}
"""Fields of Samples that the DALI graph takes besides the images' bytes, with their types."""


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
        scales = self._scales(u_scale)
        rescaled = rescaled_sizes(sizes, scales)
        room = rescaled - self.crop
        corners = np.minimum(np.floor(np.stack((u_y, u_x), axis=1) * (room + 1)).astype(np.int64), room)
        alpha = _COLOUR_SHIFT_SIGMA * random_numbers.normals(self.seed, epochs, rows, random_numbers.PURPOSE_COLOUR)
        shift = np.asarray(self.colour_shift) @ alpha
        return Samples(
            source=source,
            **source_windows(sizes, rescaled, corners, self.crop, flipped=u_flip >= 0.5),
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


def rescaled_sizes(sizes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sizes (int64 [n, 2]) after the isotropic rescale that makes the shorter side S (int64 [n]): int64 [n, 2].

    The long side is rounded half up, ⌊long · S / short + ½⌋, in exact integer arithmetic, as DALI's resize does.
    """
    shorter = sizes.min(axis=1, keepdims=True)
    return (2 * sizes * scales[:, None] + shorter) // (2 * shorter)


def source_windows(
    sizes: np.ndarray, rescaled: np.ndarray, corners: np.ndarray, crop: int | np.ndarray, flipped: np.ndarray
) -> dict[str, np.ndarray]:
    """The source window of a rectangle whose corner lies at `corners` of the rescaled image.

    sizes, rescaled, corners: int64 [n, 2]; crop: the rectangle's sides, int64 [n, 2], or the side of a square; flipped: bool
    [n]. Returns start … size, as in Samples.
    Resizing the window's region of interest equals rescaling the whole image and cropping it, because the window has a
    margin as wide as the support of the triangular filter that the resize uses. Where rescaling would change nothing, the
    window is the crop.
    """
    resized = (sizes != rescaled).any(axis=1)
    ratio = sizes / rescaled
    begin, end = corners * ratio, (corners + crop) * ratio
    margin = np.where(resized[:, None], 2 * np.maximum(ratio, 1) + 1, 0)
    start = np.maximum(np.floor(begin - margin), 0)
    stop = np.minimum(np.ceil(end + margin), sizes)
    swap = (flipped & resized)[:, None] & np.array([False, True])
    return {
        "start": start.astype(np.int32),
        "shape": (stop - start).astype(np.int32),
        "roi_start": (np.where(swap, end, begin) - start).astype(np.float32),
        "roi_end": (np.where(swap, begin, end) - start).astype(np.float32),
        "resized": resized,
        "mirrored": (flipped & ~resized).astype(np.int32),
        "size": np.broadcast_to(crop, sizes.shape).astype(np.float32),
    }
