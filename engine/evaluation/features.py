"""Features of images (appendix B of the paper), and the linear support vector machine on them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.ranks import on_rank_0
from engine.data import Data, Viewing
from engine.evaluation.inference import answers, viewing_of
from engine.evaluation.protocols import mean_over_views, whole_image
from engine.evaluation.row_files import Block, open_rows, write_rows
from engine.networks import Network
from model.dense import Dense

WIDTH = 4096
"""Activations of the penultimate layer."""

_ROWS_A_BLOCK = 4096


def write_features(
    network: Network, data: Data, split: str, scales: tuple[int, ...], path: Path, *, flip: bool, batch_size: int
) -> None:
    """Write a split's features to a .npy file: float32 [images, 4096], the network's dense features averaged over scales and
    mirror images, and then of Euclidean length 1; NaN for an image that cannot be decoded, and only for that. Every rank must
    call this.

    batch_size: images of the crop's size that are computed together. Raises UserError, TrainingError.
    """
    table = getattr(data.manifest, split)
    shape, ranks = (len(table), WIDTH), data.ranks
    dense = Dense(network.build(ranks.device))
    parts = [path.with_name(f".{path.name}.Q{scale}") for scale in scales]
    for scale, part in zip(scales, parts, strict=True):
        blocks = _blocks(network, dense, data, split, viewing_of(network, scale, batch_size), flip=flip)
        write_rows(part, shape, np.float32, blocks, ranks, missing=np.nan)
    mean = _mean(parts, shape) if ranks.is_main else iter(())
    on_rank_0(ranks, lambda: write_rows(path, shape, np.float32, mean, None, missing=np.nan))
    if ranks.is_main:
        for part in parts:
            part.unlink(missing_ok=True)  # the same command may run twice


def _blocks(network: Network, dense: Dense, data: Data, split: str, viewing: Viewing, *, flip: bool) -> Iterator[Block]:
    def compute(images: Tensor) -> Tensor:
        return mean_over_views(features, whole_image(images, network.crop), flip=flip, pixels=viewing.pixels)

    def features(images: Tensor) -> Tensor:
        with data.precision.autocast():
            return dense.features(images).float()

    torch.backends.cudnn.benchmark = False  # sizes change from batch to batch
    batches, images = data.whole_batches(viewing, split)
    yield from answers(network, data, split, batches, images, compute, f"features of {split}, Q = {viewing.scale}")


def _mean(parts: list[Path], shape: tuple[int, int]) -> Iterator[Block]:
    """The mean of arrays, each row divided by its length, block by block."""
    arrays = [open_rows(part, shape, np.float32) for part in parts]
    for first in range(0, shape[0], _ROWS_A_BLOCK):
        rows = np.arange(first, min(first + _ROWS_A_BLOCK, shape[0]))
        # In float64: squares of large activations would be beyond float32.
        mean = np.mean([array[rows] for array in arrays if array is not None], axis=0, dtype=np.float64)
        length = np.linalg.norm(mean, axis=1, keepdims=True)
        yield Block(rows, mean / np.maximum(length, np.finfo(np.float32).tiny))


def svm_accuracy(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], c: float
) -> tuple[float, float]:
    """Fit a linear support vector machine, one class against the others, to (features, labels) of train.

    Returns the accuracy on those of val and the mean over classes of the accuracy within each, 0–1. Images that cannot be
    decoded are left out of train and count as wrong in val.
    """
    from sklearn.svm import LinearSVC

    fit = ~np.isnan(train[0][:, 0])
    machine = LinearSVC(C=c, random_state=0).fit(train[0][fit], train[1][fit])
    features, labels = val
    there = ~np.isnan(features[:, 0])
    right = np.zeros(len(labels), dtype=bool)
    right[there] = machine.predict(features[there]) == labels[there]
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    return float(right.mean()), float(np.mean(by_class))
