"""Decode every image of a manifest once, and leave out those that fail, so that a run starts clean.

What has been decoded is noted beside the manifest every few seconds: interrupted at any moment, it goes on from there.
"""

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from common.errors import UserError
from common.files import DAMAGED_FILE, replacing
from common.process import usable_cores
from common.progress import printable, say, track
from pipeline.dali.decoding import decode_whole
from pipeline.dataset.headers import read_header
from pipeline.dataset.manifest import Manifest, load_manifest, read_scan, write_manifest
from pipeline.dataset.scan import SPLITS, check_no_empty_class, read_patiently
from pipeline.dataset.table import FileTable

PROGRESS = "verify-progress.json"

_SECONDS_BETWEEN_SAVES = 3.0


@dataclass(frozen=True)
class _Progress:
    fingerprint: str
    """Of the manifest whose rows are meant."""
    done: dict[str, int]
    """For each split, how many of its first rows have been decoded."""
    bad: dict[str, dict[int, str]]
    """For each split, those rows among them that cannot be decoded, with the reasons."""


def verify(manifest: Manifest) -> Manifest:
    """Decode every image, in all cores, and take what fails out of the tables. Returns the manifest that this makes.

    Raises UserError: a class is left without an image, or the manifest cannot be written. On KeyboardInterrupt, what has
    been done is noted first.
    """
    if manifest.verified:
        say("every image has been decoded before; to do it again, add --rescan")
        return manifest
    try:
        progress = _decode_all(manifest)
        verified = _write_without_bad_rows(manifest, progress)
    except OSError as error:
        raise UserError(f"cannot write the manifest in {manifest.folder} ({error.strerror})") from error
    return verified


def _decode_all(manifest: Manifest) -> _Progress:
    progress, tables = _load(manifest), {"train": manifest.train, "val": manifest.val}
    total = sum(map(len, tables.values()))
    if before := sum(progress.done.values()):
        say(f"going on after {before:,} of {total:,} images")
    _save(progress, manifest.folder)  # where that is not possible, it shows at once
    with _AfterThisImage() as interrupt:
        for split, table in tables.items():
            if not interrupt.asked:
                _decode_split(split, table, progress, manifest.folder, interrupt)
    _save(progress, manifest.folder)
    if interrupt.asked:
        done = sum(progress.done.values())
        raise KeyboardInterrupt(f"interrupted after {done:,} of {total:,} images; the same command goes on from there")
    return progress


class _AfterThisImage:
    """A context manager in which Ctrl-C only asks: raised in the middle of DALI's clean-up, it would be lost."""

    asked = False

    def __enter__(self) -> "_AfterThisImage":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _decode_split(split: str, table: FileTable, progress: _Progress, folder: Path, interrupt: _AfterThisImage) -> None:
    bad = progress.bad[split]
    # Those that failed before are tried again: they may have been repaired since.
    rows = np.array([*sorted(bad), *range(progress.done[split], len(table))], dtype=np.int64)
    results = decode_whole(table, rows, threads=usable_cores())
    saved = time.monotonic()
    for row, (image, reason) in zip(
        rows.tolist(), track(results, total=len(rows), label=f"verifying {split}", unit="images"), strict=True
    ):
        if image is None and (why := _why(table, row, reason)):
            bad[row] = why
        else:
            bad.pop(row, None)
        progress.done[split] = max(progress.done[split], row + 1)
        if interrupt.asked:
            return
        if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
            _save(progress, folder)
            saved = time.monotonic()


def _why(table: FileTable, row: int, reason: str) -> str:
    """Why an image cannot be decoded, given what the decoder says; "" where only its storage failed for a moment."""
    header = read_header(table.path(row))
    if header.storage_failed:
        header = read_patiently(table.path(row))
        _, reason = next(decode_whole(table, np.array([row]), threads=1))
    return header.reason or reason  # "empty file" says more than the decoder does


def _write_without_bad_rows(manifest: Manifest, progress: _Progress) -> Manifest:
    found = read_scan(manifest.folder)
    kept, quarantine = {}, list(found.quarantine)
    for split, table in (("train", manifest.train), ("val", manifest.val)):
        kept[split] = np.delete(found.tables[split], list(progress.bad[split]))
        for row, reason in progress.bad[split].items():
            path = os.path.relpath(table.path(row), os.path.abspath(manifest.root))
            quarantine.append((printable(path), printable(reason)))
    for split in SPLITS:
        labels = np.unique(kept[split]["label"]).tolist()
        check_no_empty_class(manifest.root, split, found.classes, labels, quarantine)
    val_lost = found.val_lost + len(progress.bad["val"])
    write_manifest(
        manifest.folder,
        found._replace(tables=kept, quarantine=quarantine, val_lost=val_lost),
        verified=True,
    )
    (manifest.folder / PROGRESS).unlink(missing_ok=True)
    return load_manifest(manifest.root, manifest.folder)


def _load(manifest: Manifest) -> _Progress:
    images = {"train": len(manifest.train), "val": len(manifest.val)}
    with contextlib.suppress(*DAMAGED_FILE):  # none, or none that can be read: from the start
        noted = json.loads((manifest.folder / PROGRESS).read_text())
        done = {split: noted["done"][split] for split in SPLITS}
        bad = {split: {int(row): str(reason) for row, reason in noted["bad"][split].items()} for split in SPLITS}
        can_be = all(
            type(done[split]) is int
            and 0 <= done[split] <= images[split]
            and all(0 <= row < done[split] for row in bad[split])
            for split in SPLITS
        )
        if noted["fingerprint"] == manifest.fingerprint and can_be:
            return _Progress(manifest.fingerprint, done, bad)
    return _Progress(manifest.fingerprint, dict.fromkeys(SPLITS, 0), {split: {} for split in SPLITS})


def _save(progress: _Progress, folder: Path) -> None:
    with replacing(folder / PROGRESS) as file:
        file.write(json.dumps(asdict(progress)).encode())
