"""The plan: everything random about a sample, decided in NumPy before DALI runs, as a pure function of its number.

Training samples are numbered g = 0, 1, 2, … without end: epoch = g div N, row = order(epoch)[g mod N], and the scale, the
crop's corner, the flip and the colour shift are draws at (seed, epoch, row). A global batch is B consecutive samples; it
may straddle two epochs, so that every image is used exactly once an epoch for any N and B, and every batch is full.
Rank r of n takes the r-th n-th of each batch. The only state is one integer, the number of samples seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline import draws
from pipeline.manifest import Table

IMAGENET_MEAN_RGB = (123.68, 116.779, 103.939)
"""Mean of ImageNet's training pixels, 0–255, as in the paper authors' released models."""

# Eigenvectors (columns) and eigenvalues of ImageNet's RGB values for the AlexNet colour shift, in 0–255 pixels: the
# figures that MXNet (image.py) and, divided by 255, fb.resnet.torch (datasets/imagenet.lua) publish.
IMAGENET_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
IMAGENET_EIGENVALUES = (55.46, 4.794, 1.148)
_COLOUR_SHIFT_SIGMA = 0.1  # section 3.1 of the paper, after AlexNet

# Samples planned in one go: a vectorised draw costs about 10 µs for each 64 samples at this size, 300 µs at 64.
_SAMPLES_A_BLOCK = 4096

PADDING_LABEL = -1
"""Label of the rows that fill up the last validation batch; they count for nothing."""


class Samples(NamedTuple):
    """What the DALI graph and the loss need to know of n samples. y comes before x everywhere."""

    names: np.ndarray
    """uint8 [n, W]: absolute paths."""
    start: np.ndarray
    """int32 [n, 2]: first pixel of the source window that is decoded."""
    shape: np.ndarray
    """int32 [n, 2]: size of that window."""
    roi_start: np.ndarray
    """float32 [n, 2]: where the crop begins, in pixels of the decoded window (fractional)."""
    roi_end: np.ndarray
    """float32 [n, 2]: where it ends; in x before it begins, for an image that is flipped horizontally."""
    mean: np.ndarray
    """float32 [n, 3]: what is subtracted from R, G, B (0–255): the data set's mean less the sample's colour shift."""
    labels: np.ndarray
    """int64 [n]"""

    @property
    def flipped(self) -> np.ndarray:
        """bool [n]"""
        return self.roi_end[..., 1] < self.roi_start[..., 1]

    def slice(self, first: int, last: int) -> "Samples":
        return Samples(*(field[first:last] for field in self))


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

    def epochs_and_rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (int64 [n]) → the epoch and the table's row of each (int64 [n], int64 [n])."""
        epochs, positions = np.divmod(numbers, len(self.table))
        return epochs, draws.order(positions, epochs, len(self.table), self.seed)

    def samples(self, numbers: np.ndarray) -> Samples:
        """All decisions about the samples with these numbers (int64 [n])."""
        epochs, rows = self.epochs_and_rows(numbers)
        names, labels, sizes = self.table.read(rows)
        u_scale, u_y, u_x, u_flip = draws.uniforms(self.seed, epochs, rows, draws.PURPOSE_GEOMETRY)
        lowest, highest = self.scale
        scales = lowest + np.floor(u_scale * (highest - lowest + 1)).astype(np.int64)
        rescaled = rescaled_sizes(sizes, scales)
        room = rescaled - self.crop
        corners = np.minimum(np.floor(np.stack((u_y, u_x), axis=1) * (room + 1)).astype(np.int64), room)
        alpha = _COLOUR_SHIFT_SIGMA * draws.normals(self.seed, epochs, rows, draws.PURPOSE_COLOUR)
        shift = np.asarray(IMAGENET_EIGENVECTORS) @ (alpha * np.asarray(IMAGENET_EIGENVALUES)[:, None])
        return Samples(
            names=names,
            **source_windows(sizes, rescaled, corners, self.crop, flipped=u_flip >= 0.5),
            mean=(np.asarray(self.mean_rgb) - shift.T).astype(np.float32, order="C"),
            labels=labels,
        )

    def batches(self, *, start: int, rank: int, world_size: int, micro_batch: int) -> Iterator[Samples]:
        """This rank's micro-batches from sample number `start` on, without end.

        batch_size must be a multiple of world_size · micro_batch: consecutive micro-batches make up the rank's share.
        """
        share = self.batch_size // world_size
        steps_a_block = max(1, _SAMPLES_A_BLOCK // share)
        within_block = np.arange(steps_a_block)[:, None] * self.batch_size + rank * share + np.arange(share)
        while True:
            block = self.samples((start + within_block).ravel())
            for first in range(0, len(block.labels), micro_batch):
                yield block.slice(first, first + micro_batch)
            start += steps_a_block * self.batch_size


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """Every image of a table once: rescaled to S, centre crop, no flip, no shift. The last batch is padded."""

    table: Table
    crop: int
    scale: int
    """Shorter side after the rescale, at least `crop`."""
    mean_rgb: tuple[float, float, float] = IMAGENET_MEAN_RGB

    def steps(self, *, world_size: int, batch_size: int) -> int:
        """Batches of `batch_size` that each rank takes in one pass."""
        return -(-len(self.table) // (world_size * batch_size))

    def batches(self, *, rank: int, world_size: int, batch_size: int) -> Iterator[Samples]:
        """This rank's batches, pass after pass without end, so that a loader prefetches across passes."""
        while True:
            for step in range(self.steps(world_size=world_size, batch_size=batch_size)):
                first = (step * world_size + rank) * batch_size
                yield self._samples(np.arange(first, first + batch_size))

    def _samples(self, rows: np.ndarray) -> Samples:
        names, labels, sizes = self.table.read(np.minimum(rows, len(self.table) - 1))
        rescaled = rescaled_sizes(sizes, np.full(len(rows), self.scale))
        # Halves round to even, as torchvision's center_crop does.
        corners = np.rint((rescaled - self.crop) / 2).astype(np.int64)
        return Samples(
            names=names,
            **source_windows(sizes, rescaled, corners, self.crop, flipped=np.zeros(len(rows), dtype=bool)),
            mean=np.tile(np.asarray(self.mean_rgb, dtype=np.float32), (len(rows), 1)),
            labels=np.where(rows < len(self.table), labels, PADDING_LABEL),
        )


def rescaled_sizes(sizes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sizes (int64 [n, 2]) after the isotropic rescale that makes the shorter side S (int64 [n]): int64 [n, 2].

    The long side is rounded half up, ⌊long · S / short + ½⌋, in exact integer arithmetic, as DALI's resize does.
    """
    shorter = sizes.min(axis=1, keepdims=True)
    return (2 * sizes * scales[:, None] + shorter) // (2 * shorter)


def source_windows(
    sizes: np.ndarray, rescaled: np.ndarray, corners: np.ndarray, crop: int, flipped: np.ndarray
) -> dict[str, np.ndarray]:
    """The source window of a crop×crop square whose corner lies at `corners` of the rescaled image.

    sizes, rescaled, corners: int64 [n, 2]; flipped: bool [n]. Returns start, shape, roi_start and roi_end, as in Samples.
    Resizing the window's region of interest equals rescaling the whole image and cropping it, because the window has a
    margin as wide as the support of the triangular filter that the resize uses.
    """
    ratio = sizes / rescaled
    begin, end = corners * ratio, (corners + crop) * ratio
    margin = 2 * np.maximum(ratio, 1) + 1
    start = np.maximum(np.floor(begin - margin), 0)
    stop = np.minimum(np.ceil(end + margin), sizes)
    swap = flipped[:, None] & np.array([False, True])
    return {
        "start": start.astype(np.int32),
        "shape": (stop - start).astype(np.int32),
        "roi_start": (np.where(swap, end, begin) - start).astype(np.float32),
        "roi_end": (np.where(swap, begin, end) - start).astype(np.float32),
    }
