"""Posteriors: how they are kept in files, averaged, and counted.

A file holds one row of class posteriors for each validation image, in float16 times POSTERIOR_SCALE. A row of LOST is an image
that cannot be decoded. All counting is from what the files hold, so that a figure does not depend on whether they were
computed just now.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.row_files import open_rows
from engine.networks import Network

POSTERIOR_SCALE = 2.0**15
"""Float16 ends at 6·10⁻⁸, above the fifth class of a network that is sure; times 2¹⁵, posteriors down to 2·10⁻¹² differ."""
LOST = -1.0
"""No posterior is negative, and none that a network gives is NaN: that would be its own fault, not the image's."""

_IMAGES_A_BLOCK = 8192  # averaged in one go


def pack(posteriors: Tensor) -> Tensor:
    """Posteriors (float32, 0–1) as the files hold them (float16)."""
    return (posteriors * POSTERIOR_SCALE).half()


def digest(network: Network) -> str:
    """A name of what a network computes: its layers, weights, mean and std; 16 hexadecimal digits."""
    summary = hashlib.blake2b(digest_size=8)
    summary.update(repr((network.arch, network.batch_norm, network.crop, network.mean_rgb, network.std_rgb)).encode())
    for name, weight in sorted(network.state.items()):
        summary.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        summary.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return summary.hexdigest()


def open_posteriors(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The posteriors in a file, float16, memory-mapped; None where there are none of this shape.

    Nor where a number is neither a posterior nor LOST: earlier versions wrote NaN both for an image that cannot be decoded and
    for a network whose answer was NaN.
    """
    array = open_rows(path, shape, np.float16)
    if array is None:
        return None
    blocks = (array[first : first + _IMAGES_A_BLOCK] for first in range(0, len(array), _IMAGES_A_BLOCK))
    holds = all(((block == LOST) | ((block >= 0) & (block <= POSTERIOR_SCALE))).all() for block in blocks)
    return array if holds else None


@dataclass(frozen=True, kw_only=True)
class Hits:
    """What was counted over a set of images."""

    images: int
    """All images of the set, each once."""
    lost: int
    """Those among them that cannot be decoded: they count as wrong."""
    top1: int
    """Images whose label has the largest posterior."""
    top5: int
    """Images whose label is among the five largest."""

    @property
    def errors(self) -> tuple[float, float]:
        """Top-1 and top-5 error in %."""
        return 100 * (1 - self.top1 / self.images), 100 * (1 - self.top5 / self.images)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An array of posteriors and its weight in a mean."""

    weight: float
    posteriors: np.ndarray
    """float16 [images, classes], as the files hold them."""


def count(parts: Sequence[Weighted], labels: np.ndarray, *, lost_before: int = 0) -> Hits:
    """Count the weighted sum of posteriors against the labels (int64 [images]).

    Of classes with equal posteriors, the first counts as the largest. lost_before: images that are in no row because they
    cannot be decoded; they count as wrong, too.
    """
    lost = top1 = top5 = 0
    for first in range(0, len(labels), _IMAGES_A_BLOCK):
        block = slice(first, first + _IMAGES_A_BLOCK)
        mean = np.sum([part.weight * part.posteriors[block].astype(np.float64) for part in parts], axis=0)
        wanted = labels[block, None]
        own = np.take_along_axis(mean, wanted, axis=1)
        before = (mean > own) | ((mean == own) & (np.arange(mean.shape[1]) < wanted))
        decoded = np.all([part.posteriors[block, 0] != LOST for part in parts], axis=0)
        rank = before.sum(axis=1)[decoded]
        lost += int((~decoded).sum())
        top1 += int((rank < 1).sum())
        top5 += int((rank < 5).sum())
    return Hits(images=len(labels) + lost_before, lost=lost + lost_before, top1=top1, top5=top5)
