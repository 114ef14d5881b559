"""How a manifest lies on the disk: a description that names its tables, and the list of the files left out."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import half_written, open_own, remove_own, replacing
from common.lock import FolderLock
from common.progress import printable, say
from pipeline.dataset.scan import SPLITS, Scan
from pipeline.dataset.table import TABLE_NAMES, FileTable

QUARANTINE = "quarantine.tsv"

_DESCRIPTION = "manifest.json"
_SECONDS_TO_WRITE = 1.0
_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A scanned data set."""

    root: Path
    """The data folder."""
    folder: Path
    """Where the manifest's own files lie."""
    classes: tuple[str, ...]
    """Class names in label order (sorted)."""
    fingerprint: str
    """Changes whenever a path, a label, a size in pixels or in bytes, a format, or the set of classes changes."""
    quarantined: int
    """Number of files left out; folder/quarantine.tsv names each with its reason."""
    val_lost: int
    """Images of val among them, which count as wrong in a validation."""
    verified: bool
    """Whether every image has been decoded once, by --verify decode."""
    train: FileTable
    val: FileTable


def find_manifest(root: Path, folder: Path, *, check_changes: bool) -> Manifest | None:
    """Open the manifest in a folder; None where there is none or, if changes are to be checked, no current and whole one."""
    for pause in (_SECONDS_TO_WRITE, 0.0):
        try:
            return _open(root, folder, check_changes=check_changes)
        except (OSError, ValueError, RecursionError):
            time.sleep(pause)  # another process may be about to replace the last of its files
    say(f"the manifest in {folder} is damaged and not used")
    return None


def _open(root: Path, folder: Path, *, check_changes: bool) -> Manifest | None:
    """See find_manifest. Raises OSError, ValueError or RecursionError where the manifest is not as it was written."""
    try:
        content = (folder / _DESCRIPTION).read_bytes()
    except OSError:
        return None
    description = _parsed(content)
    if description is None or (check_changes and _is_changed(root, description["folders"])):
        return None
    tables = _open_tables(folder, description)
    if check_changes:
        _check_quarantine(folder, description)
    return Manifest(
        root=root,
        folder=folder,
        classes=tuple(description["classes"]),
        fingerprint=description["fingerprint"],
        quarantined=description["quarantined"],
        val_lost=description["val_lost"],
        verified=description["verified"] == "decode",
        train=FileTable(root, tables["train"]),
        val=FileTable(root, tables["val"]),
    )


def _is_changed(root: Path, folders: dict[str, int]) -> bool:
    try:
        return any(os.stat(root / folder).st_mtime_ns != time for folder, time in folders.items())
    except OSError:
        return True  # one is gone


def _parsed(content: bytes) -> dict[str, Any] | None:
    """What manifest.json says; None if it is of another version. Raises ValueError or RecursionError unless it is as written."""
    description = json.loads(content)
    if not isinstance(description, dict) or not isinstance(description.get("version"), int):
        raise ValueError
    if description["version"] != _VERSION:
        return None
    if description.pop("digest", None) != _digest_of(description):
        raise ValueError  # whatever passes this needs no other check
    return description


def _digest_of(description: dict[str, Any]) -> str:
    return _digest(json.dumps(description).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _open_tables(folder: Path, description: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tables, memory-mapped. Raises OSError or ValueError where they are not those that were written."""
    tables: dict[str, np.ndarray] = {}
    touched = False
    for split in SPLITS:
        path = folder / description["tables"][split]
        tables[split] = np.lib.format.open_memmap(path, mode="r")
        touched |= os.stat(path).st_mtime_ns != description["written"][split]
    # Files that nobody touched are not read through: a start takes as long for any number of images.
    if touched and fingerprint_of(description["classes"], tables) != description["fingerprint"]:
        raise ValueError
    return tables


def _check_quarantine(folder: Path, description: dict[str, Any]) -> None:
    """Raise OSError or ValueError unless quarantine.tsv begins as it was written; runs append to it."""
    with open(folder / QUARANTINE, "rb") as file:
        own = file.read(description["quarantine"]["bytes"])
    if _digest(own) != description["quarantine"]["digest"]:
        raise ValueError


def load_manifest(root: Path, folder: Path) -> Manifest:
    """Open the manifest that another process has just opened or made in `folder`, without looking at the data folder."""
    manifest = find_manifest(Path(root), folder, check_changes=False)
    if manifest is None:
        raise UserError(
            f"the manifest of {root} in {folder} cannot be read here; is that folder shared by all machines?"
        )
    return manifest


def add_to_quarantine(folder: Path, root: str | Path, reasons: dict[str, str]) -> None:
    """Append images of the data set `root` (names with reasons) that turned out not to be decodable to quarantine.tsv.

    Raises OSError where that cannot be written.
    """
    beginning = f"{root if '://' in str(root) else os.path.abspath(root)}/"
    lines = [f"{printable(name.removeprefix(beginning))}\t{printable(reason)}\n" for name, reason in reasons.items()]
    with os.fdopen(open_own(folder / QUARANTINE, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write("".join(lines).encode())  # whole lines at once: other ranks append too


def read_quarantine(folder: Path) -> list[tuple[str, str]]:
    """Paths and reasons, both printable, in quarantine.tsv: first those of the manifest, then what runs have added.

    None of either where somebody has removed the file meanwhile.
    """
    try:
        lines = (folder / QUARANTINE).read_bytes().decode(errors="replace").split("\n")[1:-1]
    except FileNotFoundError:
        return []
    return [(path, reason) for path, _, reason in (line.partition("\t") for line in lines)]


def write_quarantine(folder: Path, quarantine: list[tuple[str, str]]) -> dict[str, Any]:
    """Write quarantine.tsv: paths and reasons, both printable. Returns what tells it again. Raises OSError."""
    content = "".join(f"{path}\t{reason}\n" for path, reason in [("path", "reason"), *quarantine]).encode()
    with replacing(folder / QUARANTINE) as file:
        file.write(content)
    return {"bytes": len(content), "digest": _digest(content)}


def fingerprint_of(classes: list[str], tables: dict[str, np.ndarray]) -> str:
    """Manifest.fingerprint."""
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for split in SPLITS:
        digest.update(tables[split].data)
    return digest.hexdigest()


def write_manifest(folder: Path, found: Scan, *, verified: bool) -> None:
    """Write all files, manifest.json last, so that a manifest is there as a whole or not at all.

    Raises OSError; UserError where another scan has been writing there for long.
    """
    fingerprint = fingerprint_of(found.classes, found.tables)
    table_names = {split: f"{split}-{fingerprint}.npy" for split in SPLITS}
    with FolderLock(folder) as lock:
        lock.take()  # another scan that ends now would remove these tables as old ones
        for split in SPLITS:
            with replacing(folder / table_names[split]) as file:
                np.save(file, found.tables[split])
        description = {
            "version": _VERSION,
            "fingerprint": fingerprint,
            "verified": "decode" if verified else None,
            "classes": found.classes,
            "images": {split: len(found.tables[split]) for split in SPLITS},
            "quarantined": len(found.quarantine),
            "val_lost": found.val_lost,
            "tables": table_names,
            "written": {split: os.stat(folder / table_names[split]).st_mtime_ns for split in SPLITS},
            "folders": found.folders,
            "quarantine": write_quarantine(folder, found.quarantine),
        }
        with replacing(folder / _DESCRIPTION) as file:
            file.write(json.dumps({**description, "digest": _digest_of(description)}).encode())
        remove_own(folder, f"{TABLE_NAMES}|{half_written(TABLE_NAMES)}", but=table_names.values())


def read_scan(folder: Path) -> Scan:
    """The scan that a manifest, just opened, was written from, or verified to. Raises OSError, ValueError or RecursionError."""
    description = _parsed((folder / _DESCRIPTION).read_bytes())
    if description is None:
        raise ValueError(f"{folder}: of another version")
    return Scan(
        classes=description["classes"],
        tables=_open_tables(folder, description),
        folders=description["folders"],
        quarantine=read_quarantine(folder)[: description["quarantined"]],
        val_lost=description["val_lost"],
    )
