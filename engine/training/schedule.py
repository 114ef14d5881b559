"""Learning-rate rules as pure functions: of where the training is, or of the validation results so far."""

import math
from collections.abc import Sequence

from engine.config import Config

_PLATEAU_DROPS = 3  # section 3.1 of the paper: the rate was divided by 10 three times
_DROP = 0.1


def plateau(base_lr: float, top1_history: Sequence[float], patience_epochs: int) -> tuple[float, bool]:
    """The paper's rule: divide by 10 when validation top-1 has not improved for `patience_epochs` epochs.

    top1_history: top-1 after each epoch so far. Returns the learning rate and whether to stop: at most three drops, and
    the plateau after the third ends the training. Epochs are counted anew after a drop; the best stays the best.
    """
    best, waited, plateaus = -math.inf, 0, 0
    for top1 in top1_history:
        if top1 > best:
            best, waited = top1, 0
            continue
        waited += 1
        if waited == patience_epochs:
            plateaus, waited = plateaus + 1, 0
    return base_lr * _DROP ** min(plateaus, _PLATEAU_DROPS), plateaus > _PLATEAU_DROPS


def step(base_lr: float, epoch: float, step_epochs: int) -> float:
    """Divide by 10 every `step_epochs` epochs. epoch: epochs done, fractional."""
    return base_lr * _DROP ** (epoch // step_epochs)


def cosine(base_lr: float, epoch: float, epochs: int, warmup_epochs: float) -> float:
    """Linear from 0 to base_lr over the warm-up, then half a cosine down to 0 at `epochs`. epoch: epochs done, fractional."""
    if epoch < warmup_epochs:
        return base_lr * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return base_lr
    done = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * done))


def total_steps(config: Config, train_images: int, *, steps_done: int, samples_seen: int) -> int:
    """Steps of the whole training: those done and those that the epochs still need; the last may straddle the end."""
    samples_left = max(0, config.epochs * train_images - samples_seen)
    total = steps_done + math.ceil(samples_left / config.batch_size)
    return min(total, config.steps) if config.steps else total
