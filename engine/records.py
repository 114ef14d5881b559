"""What a run has left of its figures: metrics.jsonl and config.yaml, of a finished run or of one that goes on."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.errors import UserError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"


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
        config = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder}: no folder of a run ({' '.join(str(error).split())}); give an --out of train.py"
        ) from error
    by_kind: dict[str, list[dict]] = {"train": [], "validation": []}
    for record in records:
        by_kind[record["kind"]].append(record)
    if not records or not isinstance(config, dict):
        raise UserError(f"{folder}: no figures of a run yet; wait for its first line of the log")
    return Run(folder=folder, config=config, training=by_kind["train"], validation=by_kind["validation"])


def read_records(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, less one that is just being written or was cut by a crash. Raises OSError."""
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") in ("train", "validation"):
            records.append(record)
    return records
