"""What a plan decides about samples, and where in its source each of them lies."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

IMAGENET_MEAN_RGB = (123.68, 116.779, 103.939)
"""Mean of ImageNet's training pixels, 0–255, as in the paper authors' released models."""

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

    def inputs(self, names: Iterable[str] | None = None) -> tuple[np.ndarray, ...]:
        """What the DALI graph takes besides the images' bytes, in the order of the names; None: of GRAPH_INPUTS."""
        return tuple(getattr(self, name) for name in names or GRAPH_INPUTS)

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
    return _windows(start, stop, begin, end, resized, crop, flipped)


def resized_windows(corners: np.ndarray, shapes: np.ndarray, crop: int, flipped: np.ndarray) -> dict[str, np.ndarray]:
    """The source windows of rectangles (int64 [n, 2], in pixels of the source) that are resized to a square, whatever their
    shape; flipped: bool [n]. Returns start … size, as in Samples.

    The window is the rectangle itself, without a margin: as with torchvision's resized_crop, the resize sees nothing beyond it.
    """
    ends = corners + shapes
    return _windows(corners, ends, corners, ends, (shapes != crop).any(axis=1), crop, flipped)


def _windows(
    start: np.ndarray,
    stop: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    resized: np.ndarray,
    crop: int | np.ndarray,
    flipped: np.ndarray,
) -> dict[str, np.ndarray]:
    """start, stop: of the windows; begin, end: of what comes out, both in pixels of the source, [n, 2]."""
    swap = (flipped & resized)[:, None] & np.array([False, True])
    return {
        "start": start.astype(np.int32),
        "shape": (stop - start).astype(np.int32),
        "roi_start": (np.where(swap, end, begin) - start).astype(np.float32),
        "roi_end": (np.where(swap, begin, end) - start).astype(np.float32),
        "resized": resized,
        "mirrored": (flipped & ~resized).astype(np.int32),
        "size": np.broadcast_to(crop, start.shape).astype(np.float32),
    }
