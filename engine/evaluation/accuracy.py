"""Exact loss, top-1 and top-5 over a validation set, on any number of ranks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ranks import Ranks, sum_over_ranks
from engine.precision import Precision
from pipeline.dali.loader import Batch
from pipeline.plan.samples import LOST_LABEL, PADDING_LABEL


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The result of one pass over a validation set."""

    loss: float
    """Mean cross-entropy in nats."""
    top1: float
    """Share of images whose label has the largest logit, 0–1."""
    top5: float
    """Share of images whose label is among the five largest logits (all, where there are fewer classes), 0–1."""
    images: int
    """Images counted: each image of the set once."""
    lost: int
    """Images among them that cannot be decoded: they count as wrong, and not in the loss."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterator[Batch],
    steps: int,
    *,
    ranks: Ranks,
    precision: Precision,
    lost_before: int = 0,
    confusion: Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Run `steps` batches of this rank's loader through the model; count on the device, add up over ranks, divide once.

    Rows with PADDING_LABEL count for nothing, those with LOST_LABEL as wrong, as do those whose logits are not all finite. The
    model is in training mode again afterwards. One device sync, at the end.
    lost_before: images of the set that are in no batch because they cannot be decoded; they count as wrong, too.
    confusion: int64 [classes, classes] of zeros on the device: becomes the number of images of each class (row) that were
    taken for each class (column), on every rank; those that cannot be decoded are in none.
    stop: asked after each batch, gives the same answer on all ranks; once it says yes, the result is None.
    """
    model.eval()
    start = [0, 0, 0, lost_before, lost_before] if ranks.is_main else [0] * 5  # once, not once for each rank
    sums = torch.tensor(start, dtype=torch.float64, device=ranks.device)  # loss, top-1, top-5, images, lost
    for _ in range(steps):
        images, labels = next(batches)
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        targets = labels.clamp(min=PADDING_LABEL)  # for the loss, a lost image is padding
        likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        # An answer that is not finite is right for no class: of NaN, topk takes whichever it likes.
        best = (likeliest == labels[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
        if confusion is not None:
            places = labels.clamp(min=0) * len(confusion) + likeliest[:, 0]
            confusion.view(-1).index_add_(0, places, (labels >= 0).long())
        sums += torch.stack(
            (
                F.cross_entropy(logits, targets, ignore_index=PADDING_LABEL, reduction="sum").double(),
                best[:, 0].sum().double(),
                best.sum().double(),
                (labels != PADDING_LABEL).sum().double(),
                (labels == LOST_LABEL).sum().double(),
            )
        )
        if stop():
            model.train()
            return None
    model.train()
    if confusion is not None:
        sum_over_ranks(confusion, ranks)
    loss, top1, top5, images_counted, lost = sum_over_ranks(sums, ranks).tolist()
    return Accuracy(
        loss=loss / max(images_counted - lost, 1),
        top1=top1 / images_counted,
        top5=top5 / images_counted,
        images=round(images_counted),
        lost=round(lost),
    )
