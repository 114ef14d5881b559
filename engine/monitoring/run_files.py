"""What a run has left of its figures: metrics.jsonl and config.yaml, of a finished run or of one that goes on."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import yaml

from common.errors import UserError
from common.files import replacing
from common.flat_yaml import read_flat_yaml
from common.progress import printable, say_once

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
_FIGURES = {
    "train": ("step", "epoch", "loss", "lr", "images_per_second", "data_wait"),
    "validation": ("step", "epoch", "loss", "top1", "top5"),
}
"""What a record of each kind has at least, all numbers; a loss may be infinite or NaN, step and epoch may not."""
_LONGEST_LINE = 64 << 10
_LARGEST = 1e40  # float32 ends at 3.4e38; matplotlib cannot scale axes to what is far beyond


@dataclass(frozen=True, kw_only=True)
class Run:
    """The figures of a run, in the order of its steps."""

    folder: Path
    config: dict
    """Its flags."""
    training: list[dict]
    """Figures of some steps each: step, epoch, loss, lr, images_per_second, data_wait."""
    validation: list[dict]
    """Results: step, epoch, loss, top1, top5, images, lost."""


def read_run(folder: Path) -> Run:
    """Raises UserError where the folder holds no figures of a run."""
    try:
        records = read_records(folder / METRICS)
        config = {flag: scalar.value for flag, scalar in read_flat_yaml(folder / CONFIG).items()}
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable for this user"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder}: no folder of a run ({printable(' '.join(str(error).split()))}); give an --out of train.py"
        ) from error
    by_kind: dict[str, list[dict]] = {kind: [] for kind in _FIGURES}
    for record in records:
        by_kind[record["kind"]].append(record)
    if not records or not config:
        raise UserError(f"{folder}: no figures of a run yet; wait for its first line of the log")
    return Run(folder=folder, config=config, training=by_kind["train"], validation=by_kind["validation"])


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, less one that is just being written or was cut by a crash. Raises OSError.

    Lines that are no records are left out with a warning.
    """
    records, damaged = [], 0
    with open(path, "rb") as file:
        for line, record in _lines(file):
            if record:
                records.append(record)
            elif record is None and line.endswith(b"\n"):
                damaged += 1
    if damaged:
        say_once(f"warning: {printable(str(path))}: damaged lines are left out: {damaged}")
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Take the records of later steps out of a metrics.jsonl, if there is one, so that they can come again. Raises OSError.

    All else stays as it is, damaged lines too, but for what a crash has cut at the end.
    """
    last = b"\n"

    def stays(line: bytes, record: dict | None) -> bool:
        return record["step"] <= step if record else record is not None or line.endswith(b"\n")

    try:
        with open(path, "rb") as file:
            everything = all(stays(last := line, record) for line, record in _lines(file))
    except FileNotFoundError:
        return
    if everything and last.endswith(b"\n"):
        return
    last = b"\n"
    with open(path, "rb") as old, replacing(path) as new:
        for line, record in _lines(old):
            if stays(line, record):
                new.write(last := line)
        if not last.endswith(b"\n"):
            new.write(b"\n")


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, dict | None]]:
    """Each line and its record: empty for a line that is not for us, None for one that is damaged, or cut and has no end yet.

    What is longer than any record comes in pieces, of which only the last counts as damaged.
    """
    begins = True
    while line := file.readline(_LONGEST_LINE):
        ends = line.endswith(b"\n") or len(line) < _LONGEST_LINE
        yield line, (_record(line) if begins else None) if ends else {}
        begins = ends


def _record(line: bytes) -> dict | None:
    if not line.strip():
        return {}
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    kind = record.get("kind")
    if not isinstance(kind, str):
        return None
    if kind not in _FIGURES:
        return {}  # of another version, or another program
    if not all(_is_number(record.get(name)) for name in _FIGURES[kind]):
        return None
    if not (math.isfinite(record["step"]) and math.isfinite(record["epoch"])):
        return None
    return record


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and not _LARGEST < abs(value) < math.inf
