"""One pass of a network over a split's images, this rank's share of it: which image gives which answer."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from common.errors import TrainingError
from common.progress import printable, track
from engine.data import Data, Viewing
from engine.evaluation.row_files import Block
from engine.networks import Network
from engine.precision import Precision
from pipeline.dali.loader import Batch
from pipeline.plan.samples import LOST_LABEL, PADDING_LABEL

_NO_ROW = -1  # of what fills up a batch, and of images that cannot be decoded


def viewing_of(network: Network, scale: int, batch_size: int) -> Viewing:
    """Images as a network takes them, rescaled to a shorter side of `scale` pixels: with its crop, its mean and its std."""
    return Viewing(
        crop=network.crop, scale=scale, mean_rgb=network.mean_rgb, std_rgb=network.std_rgb, batch_size=batch_size
    )


def center_crops(data: Data, viewing: Viewing) -> tuple[Iterator[Batch], int]:
    """The validation's batches of one pass, the rows' numbers in place of the labels, and this rank's images in them."""
    found = data.validation_batches(viewing)
    assert found
    batches, steps = found
    rank, world_size = data.ranks.rank, data.ranks.world_size

    def with_rows() -> Iterator[Batch]:
        for step in range(steps):
            images, labels = next(batches)
            first = (step * world_size + rank) * len(labels)
            rows = torch.arange(first, first + len(labels), device=labels.device)
            yield images, torch.where((labels == PADDING_LABEL) | (labels == LOST_LABEL), _NO_ROW, rows)

    return with_rows(), -(-data.val_images // world_size)


def answers(
    network: Network,
    data: Data,
    split: str,
    batches: Iterator[Batch],
    images: int,
    compute: Callable[[Tensor], Tensor],
    label: str,
) -> Iterator[Block]:
    """What `compute` ([n, 3, height, width] → [n, width]) says of each image; every rank must go through to the end.

    batches: images and their rows' numbers, `images` of them. Raises TrainingError where an answer is not finite, and where
    more images of the split cannot be decoded, on all ranks together, than may be.
    """
    table = data.lost[split].table

    def finite(block: Block) -> Block:
        good = np.isfinite(block.values).all(axis=1)
        if not good.all():
            row = block.rows[~good][:1]
            raise not_finite(network, table.name(table.read(row).source[0]), data.precision)
        return block

    if data.ranks.is_main:
        every = data.ranks.world_size  # rank 0 shows its own progress as that of all
        batches = track(
            batches, total=images * every, label=label, unit="images", weight=lambda batch: len(batch[1]) * every
        )
    before: tuple[Tensor, Tensor] | None = None
    for batch, rows in batches:
        now = rows, compute(batch)
        if before:  # one behind: the device is busy with this batch while the host waits for the last one
            yield finite(_block(*before))
        before = now
    if before:
        yield finite(_block(*before))
    lost = data.lost[split]
    lost.check(lost.of_all_ranks(data.ranks))


def _block(rows: Tensor, values: Tensor) -> Block:
    kept = rows != _NO_ROW
    return Block(rows[kept].cpu().numpy(), values[kept].cpu().numpy())


def not_finite(network: Network, image: str, precision: Precision) -> TrainingError:
    """What ends a program whose network has no finite answer for an image that can be decoded."""
    if precision.name == "fp16":  # whose largest number is 65504
        return TrainingError(
            f"{network.name}: its answer for {printable(image)} is not finite in float16; compute in float32, with "
            "--precision fp32 where there is that flag, else with --device cpu"
        )
    return TrainingError(
        f"{network.name}: its answer for {printable(image)} is not finite; its weights, though finite, cannot be used"
    )
