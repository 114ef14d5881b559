"""Checkpoints: last.pt, the last few by their steps (step-00001234.pt), and the best by validation top-1 (best.pt).

All are names of the same files: last.pt is also the newest of the numbered ones, so that it costs no disk of its own.
A file appears under its name only when it is complete and on the disk, so a crash at any moment leaves the last good one.
There are no states of random generators in a checkpoint: order, augmentation and dropout are functions of (seed, samples
or steps done, rank), so the two counters say it all, for any number of ranks.
"""

import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from common.errors import TrainingError, UserError
from common.files import link_over, replacing
from common.progress import say
from pipeline.plan import IMAGENET_COLOUR_SHIFT

LAST, BEST = "last.pt", "best.pt"
_FORMAT = "vgg-dali checkpoint 1"
_DAMAGED = "damaged, or not a checkpoint of this trainer"


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
    world_size: int
    """Ranks that the run had."""
    # Below, what older files do not have.
    batch_norm: bool = False
    """Whether the network has batch normalisation."""
    colour_shift: list[list[float]] = field(default_factory=lambda: [list(row) for row in IMAGENET_COLOUR_SHIFT])
    """The 3×3 matrix of the training's colour shift: see pipeline.plan.ColourShift."""
    ema: dict | None = None
    """The moving average of the weights, under the keys of `model`; None where the run kept none."""


def save(checkpoint: Checkpoint, out: Path, *, is_best: bool, keep: int) -> Path:
    """Write OUT/last.pt and give it its number; make OUT/best.pt the same file if it is the best. Returns last.pt's path.

    keep: numbered checkpoints that stay; those of later steps, which a run has left that went back, do not.
    Raises TrainingError, with the last good checkpoint in place, where weights are not finite or the disk refuses.
    """
    last = out / LAST
    # A sum is finite only where all that is added up is; it takes a thirtieth of the time of isfinite().all().
    if not all(bool(weight.sum().isfinite()) for weight in checkpoint.model.values()):
        raise TrainingError(f"the weights are not finite any more; the last good checkpoint is {last_good(out)}")
    try:
        with replacing(last) as file:
            # Not asdict(), which would copy every tensor.
            content = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
            torch.save({"format": _FORMAT, **content}, file)
        link_over(last, out / f"step-{checkpoint.steps:08}.pt")
        if is_best:
            link_over(last, out / BEST)
        numbered = _numbered(out)
        for number in sorted(number for number in numbered if number <= checkpoint.steps)[-keep:]:
            del numbered[number]
        for outdated in numbered.values():
            outdated.unlink()
    except (OSError, RuntimeError) as error:
        # After a failed write, torch complains of where the file ends; what happened is the exception before.
        cause = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), None)
        cause = cause or str(error).splitlines()[0]
        raise TrainingError(
            f"cannot write a checkpoint to {out} ({cause}); the last good one is {last_good(out)}"
        ) from error
    return last


def last_good(out: Path) -> str:
    """The path of OUT/last.pt for a message, or that there is none: what is under that name is complete."""
    last = out / LAST
    return str(last) if last.exists() else "none: nothing was saved yet"


def all_in(out: Path) -> list[Path]:
    """The checkpoints in a folder, good or not, in the order in which a run would rather go on from them."""
    numbered = _numbered(out)
    names = [out / LAST, *(numbered[number] for number in sorted(numbered, reverse=True)), out / BEST]
    return [path for path in names if path.exists()]


def newest_good(out: Path) -> Path | None:
    """The newest checkpoint in a folder that can be read, with a warning if a newer one cannot; None if there is none.

    Raises UserError where there are checkpoints and none of them is good.
    """
    found = all_in(out)
    good = next((path for path in found if _is_good(path)), None)
    if found and not good:
        load(found[0])  # says what is wrong with it
    if good and good != found[0]:
        say(f"warning: checkpoint {found[0]}: {_DAMAGED}; going on from the newest good one")
    return good


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors memory-mapped on the CPU.

    Raises UserError, naming the file and, if there is one, a good one beside it: no such file, truncated, foreign.
    """
    try:
        return _read(path)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
        cause = "no such file" if isinstance(error, FileNotFoundError) else _DAMAGED
        other = next((other for other in all_in(path.parent) if other != path and _is_good(other)), None)
        hint = f"; {other} is a good one" if other else ""
        raise UserError(f"checkpoint {path}: {cause}{hint}") from error


def _read(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if content.pop("format") != _FORMAT:
        raise ValueError("another format")
    return Checkpoint(**content)


def _is_good(path: Path) -> bool:
    try:
        _read(path)
    except Exception:  # whatever is wrong with it, it is not good
        return False
    return True


def _numbered(out: Path) -> dict[int, Path]:
    """Steps → path of the numbered checkpoints."""
    return {int(path.stem[5:]): path for path in out.glob("step-*.pt") if path.stem[5:].isdecimal()}
