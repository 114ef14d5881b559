"""Checkpoints: last.pt, the last few by their steps (step-00001234.pt), and the best by validation top-1 (best.pt).

All are names of the same files: last.pt is also the newest of the numbered ones, so that it costs no disk of its own.
A file appears under its name only when it is complete and on the disk, so a crash at any moment leaves the last good one.
There are no states of random generators in a checkpoint: order, augmentation and dropout are functions of (seed, sample), so the
two counters say it all, for any number of ranks.
"""

import argparse
import contextlib
import lzma
import os
import re
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import TrainingError, UserError
from common.files import is_storage_trouble, link_over, replacing
from common.progress import printable, say
from model.vgg import CONFIGURATIONS, STRIDE
from model.weights import NOT_DIVIDED, is_finite, is_plain
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT

LAST, BEST = "last.pt", "best.pt"
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
    """Training samples done: the next batch begins with this sample of the plan. After --allow-changed-data, counted as if the
    epochs done had been of the data as it is now."""
    history: list[dict]
    """Validation results after each epoch (epoch, samples_seen at its end, which older files do not have, loss, top1, top5,
    images, lost); the schedule is a function of it."""
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
    """The 3×3 matrix of the training's colour shift: see pipeline.plan.samples.ColourShift."""
    std_rgb: list[float] = field(default_factory=lambda: list(NOT_DIVIDED))
    """What the pixels were divided by, after the mean was subtracted."""
    ema: dict | None = None
    """The moving average of the weights, under the keys of `model`; None where the run kept none."""
    decoder_share: float | None = None
    """The CPU's share of each batch with --decoder split, once it is found; a run that goes on keeps to it."""


def save(checkpoint: Checkpoint, out: Path, *, is_best: bool, keep: int) -> Path:
    """Write OUT/last.pt and give it its number; make OUT/best.pt the same file if it is the best. Returns last.pt's path.

    keep: numbered checkpoints that stay; those of later steps, which a run has left that went back, do not.
    Raises TrainingError, with the last good checkpoint in place, where weights are not finite or the disk refuses.
    """
    last = out / LAST
    if not all(map(is_finite, checkpoint.model.values())):
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
    return [path for path in names if os.path.lexists(path)]  # a link to a disk that is away counts, too


def newest_good(out: Path) -> Path | None:
    """The newest checkpoint in a folder that can be read, with a warning if a newer one cannot; None if there is none.

    Raises UserError where there are checkpoints and none of them is good, or where the newest cannot be read at all: to go on
    from an older one would lose what a disk or a permission only hides.
    """
    found = all_in(out)
    reasons: list[str] = []
    for path in found:
        try:
            _read(path)
        except Unreachable as error:
            raise UserError(f"checkpoint {path}: {error}") from error
        except ValueError as error:
            reasons.append(str(error))
        else:
            if reasons:
                say(f"warning: checkpoint {found[0]}: {reasons[0]}; going on from the newest good one")
            return path
    if found:
        raise UserError(f"checkpoint {found[0]}: {reasons[0]}")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors memory-mapped on the CPU. Every entry has the form that Checkpoint says, and all weights
    are finite.

    Raises UserError, naming the file, what is wrong with it and, if there is one, a good one beside it.
    """
    try:
        return _read(path)
    except Unreachable as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except ValueError as error:
        other = next((other for other in all_in(path.parent) if other != path and _is_good(other)), None)
        hint = f"; {other} is a good one" if other else ""
        raise UserError(f"checkpoint {path}: {error}{hint}") from error


class Unreachable(ValueError):
    """A file whose content nobody knows: it is not there, or cannot be read."""


def read_file(path: Path, *, else_is: str) -> object:
    """What torch.save, or safetensors, has written to a file, on the CPU and mapped where it can be. Nothing in it is run.

    Raises Unreachable or another ValueError, a sentence without the path. else_is: what a file is not that torch cannot read.
    """
    start = _first_bytes(path)
    if not start:
        raise ValueError("damaged: it is empty")
    if start[8:] == b"{":  # behind the length of a JSON text
        return _read_safetensors(path)
    try:
        # torch's warnings are for its callers. Namespace: what torchvision's own training saves beside the weights.
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
            _name_in_utf_8(path) as name,
        ):
            warnings.simplefilter("ignore")
            # Files of torch before 1.6, as torchvision's of its VGGs are, are no zip files and cannot be mapped.
            return torch.load(name, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except Exception as error:  # torch.load raises whatever it stumbles over
        if isinstance(error, OSError) and is_storage_trouble(error):
            raise Unreachable(f"cannot be read ({error.strerror})") from error
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"it holds Python objects ({printable(found[1])}), and loading those could run code; save the state_dict() "
                "alone"
            ) from error
        raise ValueError(_other_kind(path, start) or f"damaged, or not {else_is}") from error


@contextlib.contextmanager
def _name_in_utf_8(path: Path) -> Iterator[str]:
    """The path as torch can take it: a name that is not UTF-8 by the number of the open file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield str(path)


def is_own(content: object) -> bool:
    """Whether what read_file gave is a checkpoint of this trainer, of whichever version."""
    version = content.get("format") if isinstance(content, dict) else None
    return isinstance(version, str) and version.startswith(_FORMAT[:-1])


def _first_bytes(path: Path) -> bytes:
    """Up to nine. Raises Unreachable."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found = [str(path / name) for name in (LAST, BEST) if (path / name).exists()]
            raise Unreachable(f"is a folder; give {' or '.join(found) or 'a file'}")
        if not stat.S_ISREG(mode):
            raise Unreachable("is not a file")
        with path.open("rb") as file:
            return file.read(9)
    except FileNotFoundError as error:
        raise Unreachable("is a link to a file that is not there" if path.is_symlink() else "no such file") from error
    except OSError as error:
        raise Unreachable(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # the folder's and the pipe's pass; a NUL in the path
        raise error if isinstance(error, Unreachable) else Unreachable("no such file") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open  # not in requirements.txt
    except ImportError as error:
        raise ValueError(
            f"it is a safetensors file; pip install safetensors, and give it as torchvision:{path}"
        ) from error
    try:
        with _name_in_utf_8(path) as name, safe_open(name, framework="pt") as file:
            state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118  # it is no dict
            state._metadata = file.metadata() or {}  # type: ignore[attr-defined]  # where torch's state dicts have theirs
            return state
    except OSError as error:
        raise Unreachable(f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ValueError("damaged, or not a safetensors file") from error


def _other_kind(path: Path, start: bytes) -> str:
    """What a file is that torch cannot read, as a sentence; "" where it does not show."""
    if re.match(rb"\x80[\3-\5]", start):  # torch.save's are of protocol 2
        return "it was written by pickle, not by torch.save"
    try:
        if tarfile.is_tarfile(path):
            return "it is a tar archive of something else"
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile):
        return ""  # cut short, or neither
    if "constants.pkl" in names:
        return "it is a TorchScript program; save its state_dict() instead"
    return "" if "data.pkl" in names else "it is a zip archive of something else"


def _read(path: Path) -> Checkpoint:
    """Raises Unreachable or another ValueError, a sentence without the path."""
    kind = "a checkpoint of this trainer"
    content = read_file(path, else_is=kind)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not {kind}")
    if not is_own(content):
        raise ValueError(f"it is not {kind}; weights of other trainers are given as torchvision:{path}")
    if content.pop("format") != _FORMAT:
        raise ValueError("it was written by another version of this trainer")
    entries = {entry.name: entry for entry in fields(Checkpoint)}
    required = {
        name for name, entry in entries.items() if entry.default is MISSING and entry.default_factory is MISSING
    }
    if missing := sorted(required - content.keys()):
        raise ValueError(f"its entry {missing[0]} is missing")
    if unknown := [str(name) for name in content if name not in entries]:
        raise ValueError(f"it was written by another version of this trainer, which keeps {printable(unknown[0])} too")
    for name, (holds, wanted) in _FORMS.items():
        if name in content and not holds(content[name]):
            raise ValueError(f"its entry {name} is not {wanted}")
    checkpoint = Checkpoint(**content)
    for what, state in (("model", checkpoint.model), ("ema", checkpoint.ema or {})):
        for name, value in state.items():
            if not is_finite(value):
                raise ValueError(f"its tensor {what}.{name} holds values that are not finite (NaN or infinity)")
    return checkpoint


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30  # NaN is not


def _are_three(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(holds, value))


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) and is_plain(weight) for name, weight in value.items()
    )


def _is_result(value: object) -> bool:
    """Whether a value is an entry of the history."""
    return (
        isinstance(value, dict)
        and _is_count(value.get("epoch"))
        and _is_count(value.get("samples_seen", 0))
        and isinstance(value.get("loss"), float | int)  # NaN, where nothing could be decoded
        and all(_is_number(value.get(name)) and 0 <= value[name] <= 1 for name in ("top1", "top5"))
    )


# Of each entry, what it must be, and that in words.
_FORMS: dict[str, tuple[Callable, str]] = {
    "arch": (lambda value: isinstance(value, str) and value in CONFIGURATIONS, "one of the paper's configurations"),
    "crop": (lambda value: _is_count(value) and value > 0 and value % STRIDE == 0, "a multiple of 32"),
    "classes": (
        lambda value: (
            isinstance(value, list)
            and len(value) > 0
            and all(isinstance(name, str) for name in value)
            and len(set(value)) == len(value)
        ),
        "a list of different class names",
    ),
    "mean_rgb": (
        lambda value: _are_three(value, lambda mean: _is_number(mean) and 0 <= mean <= 255),
        "a list of three numbers in 0–255",
    ),
    "model": (lambda value: _is_state(value) and value, "a state dict of dense tensors"),
    "optimizer": (lambda value: isinstance(value, dict), "a state dict"),
    "scaler": (lambda value: isinstance(value, dict), "a state dict"),
    "steps": (_is_count, "a number from 0 on"),
    "samples_seen": (_is_count, "a number from 0 on"),
    "history": (
        lambda value: isinstance(value, list) and all(map(_is_result, value)),
        "a list of validation results with epoch, loss, top1 and top5",
    ),
    "fingerprint": (lambda value: isinstance(value, str), "a text"),
    "config": (
        lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
        "a table of flags",
    ),
    "world_size": (lambda value: _is_count(value) and value > 0, "a number from 1 on"),
    "batch_norm": (lambda value: isinstance(value, bool), "true or false"),
    "colour_shift": (
        lambda value: _are_three(value, lambda row: _are_three(row, _is_number)),
        "a list of three lists of three numbers",
    ),
    "std_rgb": (
        lambda value: _are_three(value, lambda std: _is_number(std) and 1 <= std <= 255),
        "a list of three numbers in 1–255",
    ),
    "ema": (lambda value: value is None or _is_state(value), "a state dict of dense tensors"),
    "decoder_share": (
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
        "a number in [0, 1]",
    ),
}


def _is_good(path: Path) -> bool:
    try:
        _read(path)
    except ValueError:
        return False
    return True


def _numbered(out: Path) -> dict[int, Path]:
    """Steps → path of the numbered checkpoints."""
    found = ((re.fullmatch(r"step-(\d{8,})\.pt", path.name), path) for path in out.glob("step-*.pt"))
    return {int(name[1]): path for name, path in found if name}  # not step-5.pt, which is not ours
