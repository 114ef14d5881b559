"""A data set's manifest: the memory-mapped tables of its images.

A data set is a folder DATA in torchvision's ImageFolder form, DATA/train/<class>/* and DATA/val/<class>/*. It is scanned once;
the result is kept in DATA/.vgg-manifest or, where DATA cannot be written, in the user's cache folder:

    manifest.json        classes, fingerprint, the folders' modification times; names the two tables; written last
    train-….npy, val-….npy   one row an image (pipeline/dataset/scan.py), memory-mapped, shared by all ranks
    quarantine.tsv       files left out, each with the reason

The next start costs one stat per folder, whatever the number of images. A file overwritten in place does not change its
folder's time: then ask for --rescan. Where the manifest's own files are not as they were written, it is made anew.

The scan reads headers, and leaves out the kinds of files that are not decoded to the right pixels (pipeline/dataset/headers.py).
--verify decode also decodes every image, once, and leaves out those that fail (pipeline/preparation/verify.py).
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import cache_folder, half_written, remove_own, replacing
from common.lock import FolderLock
from common.progress import say
from pipeline.dataset.quarantine import QUARANTINE, check_quarantine, digest_of, read_quarantine, write_quarantine
from pipeline.dataset.scan import SPLITS, Scan, check_layout, scan
from pipeline.dataset.table import TABLE_NAMES, FileTable

_FOLDER_NAME = ".vgg-manifest"
_DESCRIPTION = "manifest.json"
_SECONDS_TO_WRITE = 1.0
_VERSION = 4


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


def open_manifest(root: Path, *, rescan: bool = False) -> Manifest:
    """Open the manifest of a data folder; scan the folder first where there is none, or where the folder changed.

    Raises UserError: no such folder, no train/ or val/, classes that differ, a class without a readable image.
    """
    root = Path(root)
    check_layout(root)
    manifest = None if rescan else _find_current(root)
    if manifest is None:
        manifest = load_manifest(root, _write_somewhere(root, scan(root)))
    if manifest.quarantined:
        lost = f" ({manifest.val_lost:,} images of val among them count as wrong)" if manifest.val_lost else ""
        say(
            f"{manifest.quarantined:,} files cannot be decoded and are left out{lost}: see "
            f"{manifest.folder / QUARANTINE}"
        )
    return manifest


def _possible_folders(root: Path) -> list[Path]:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()
    beside_images, cached = root / _FOLDER_NAME, cache_folder() / "manifests" / name
    # Through a link, files of somebody else would be replaced.
    return [cached] if beside_images.is_symlink() else [beside_images, cached]


def _find_current(root: Path) -> Manifest | None:
    found = (find_manifest(root, folder, check_changes=True) for folder in _possible_folders(root))
    return next(filter(None, found), None)


def _write_somewhere(root: Path, found: Scan) -> Path:
    """Write the manifest into the first possible folder that can be written; return that folder."""
    problems = []
    for folder in _possible_folders(root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_manifest(folder, found, verified=False)
            return folder
        except OSError as error:
            problems.append(f"{folder} ({error.strerror})")
    raise UserError(
        f"no place for the manifest of {root}: cannot write {' nor '.join(problems)}; set XDG_CACHE_HOME to a folder of yours"
    )


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
        check_quarantine(folder, description["quarantine"])
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
    return digest_of(json.dumps(description).encode())


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


def load_manifest(root: Path, folder: Path) -> Manifest:
    """Open the manifest that another process has just opened or made in `folder`, without looking at the data folder."""
    manifest = find_manifest(Path(root), folder, check_changes=False)
    if manifest is None:
        raise UserError(
            f"the manifest of {root} in {folder} cannot be read here; is that folder shared by all machines?"
        )
    return manifest


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
