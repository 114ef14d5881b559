"""Checkpoints: last.pt, the one before it (previous.pt), and the best by validation top-1 (best.pt).

A file appears under its name only when it is complete and on the disk, so a crash at any moment leaves the last good one.
There are no states of random generators in a checkpoint: order, augmentation and dropout are functions of (seed, samples
or steps done, rank), so the two counters say it all, for any number of ranks.
"""

import pickle
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from common.errors import TrainingError, UserError
from common.files import link_over, replacing

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_FORMAT = "vgg-dali checkpoint 1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to go on, or that a network needs to be used."""

    arch: str
    crop: int
    classes: list[str]
    """Class names in label order."""
    mean_rgb: list[float]
    """What was subtracted from the pixels (0–255)."""
    model: dict
    """State dict with torchvision's keys."""
    optimizer: dict
    scaler: dict
    steps: int
    """Optimizer steps done."""
    samples_seen: int
    """Training samples done: the next batch begins with this sample of the plan."""
    history: list[dict]
    """Validation results after each epoch (epoch, loss, top1, top5); the schedule is a function of it."""
    fingerprint: str
    """Of the data set's manifest."""
    config: dict
    """The configuration of the run, as in config.yaml."""


def save(checkpoint: Checkpoint, out: Path, *, is_best: bool) -> Path:
    """Write OUT/last.pt, keeping the one before; make OUT/best.pt the same file if it is the best. Returns last.pt's path.

    Raises TrainingError, with the last good checkpoint in place, where weights are not finite or the disk refuses.
    """
    last = out / LAST
    if not all(bool(weight.isfinite().all()) for weight in checkpoint.model.values()):
        raise TrainingError(f"the weights are not finite any more; the last good checkpoint is {last_good(out)}")
    try:
        with replacing(last) as file:
            # Not asdict(), which would copy every tensor.
            content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
            torch.save({"format": _FORMAT, **content}, file)
            if last.exists():
                link_over(last, out / PREVIOUS)
        if is_best:
            link_over(last, out / BEST)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainingError(
            f"cannot write a checkpoint to {out} ({cause}); the last good one is {last_good(out)}"
        ) from error
    return last


def last_good(out: Path) -> str:
    """The path of OUT/last.pt for a message, or that there is none: what is under that name is complete."""
    last = out / LAST
    return str(last) if last.exists() else "none: nothing was saved yet"


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors memory-mapped on the CPU.

    Raises UserError, naming the file and, if there is one, a good one beside it: no such file, truncated, foreign.
    """
    try:
        return _read(path)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
        cause = (
            "no such file" if isinstance(error, FileNotFoundError) else "damaged, or not a checkpoint of this trainer"
        )
        other = _good_one_beside(path)
        hint = f"; go on from the one before with --resume {other}" if other else ""
        raise UserError(f"checkpoint {path}: {cause}{hint}") from error


def _read(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if content.pop("format") != _FORMAT:
        raise ValueError("another format")
    return Checkpoint(**content)


def _good_one_beside(path: Path) -> Path | None:
    for name in (PREVIOUS, BEST):
        other = path.with_name(name)
        if other == path or not other.exists():
            continue
        try:
            _read(other)
        except Exception:  # whatever is wrong with it, it is not good
            continue
        return other
    return None
