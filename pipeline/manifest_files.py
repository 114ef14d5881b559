"""How a manifest lies on the disk: a description that names its tables, and the list of the files left out."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import replacing
from common.progress import printable
from pipeline.scan import SPLITS, Scan
from pipeline.tables import FileTable

QUARANTINE = "quarantine.tsv"

_VERSION = 2


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
    """Open the manifest in a folder; None where there is none or, if changes are to be checked, no current one."""
    try:
        description = json.loads((folder / "manifest.json").read_text())
        if description["version"] != _VERSION:
            return None
        if check_changes and _modification_times(root, description["folders"]) != description["folders"]:
            return None
        tables = {split: np.load(folder / description["tables"][split], mmap_mode="r") for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or from an interrupted machine: a scan makes it anew
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


def _modification_times(root: Path, folders: Iterable[str]) -> dict[str, int]:
    return {folder: os.stat(root / folder).st_mtime_ns for folder in folders}


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
    with open(folder / QUARANTINE, "ab") as file:  # whole lines at once: other ranks append too
        file.write("".join(lines).encode())


def read_quarantine(folder: Path) -> list[tuple[str, str]]:
    """Paths and reasons, both printable, in quarantine.tsv: first those of the manifest, then what runs have added."""
    lines = (folder / QUARANTINE).read_text(encoding="utf-8").split("\n")[1:-1]
    return [(path, reason) for path, _, reason in (line.partition("\t") for line in lines)]


def write_quarantine(folder: Path, quarantine: list[tuple[str, str]]) -> None:
    """Write quarantine.tsv: paths and reasons, both printable. Raises OSError."""
    with replacing(folder / QUARANTINE) as file:
        file.write("".join(f"{path}\t{reason}\n" for path, reason in [("path", "reason"), *quarantine]).encode())


def write_manifest(folder: Path, found: Scan, *, verified: bool) -> None:
    """Write all files, manifest.json last, so that a manifest is there as a whole or not at all. Raises OSError."""
    digest = hashlib.blake2b(json.dumps(found.classes).encode(), digest_size=16)
    for split in SPLITS:
        digest.update(found.tables[split].data)
    fingerprint = digest.hexdigest()
    table_names = {split: f"{split}-{fingerprint}.npy" for split in SPLITS}
    description = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "verified": "decode" if verified else None,
        "classes": found.classes,
        "images": {split: len(found.tables[split]) for split in SPLITS},
        "quarantined": len(found.quarantine),
        "val_lost": found.val_lost,
        "tables": table_names,
        "folders": found.folders,
    }
    for split in SPLITS:
        with replacing(folder / table_names[split]) as file:
            np.save(file, found.tables[split])
    write_quarantine(folder, found.quarantine)
    with replacing(folder / "manifest.json") as file:
        file.write(json.dumps(description).encode())
    for stale in folder.glob("*.npy"):
        if stale.name not in table_names.values():
            stale.unlink(missing_ok=True)


def read_scan(folder: Path) -> Scan:
    """The scan that a manifest was written from, or verified to."""
    description = json.loads((folder / "manifest.json").read_text())
    return Scan(
        classes=description["classes"],
        tables={split: np.load(folder / description["tables"][split], mmap_mode="r") for split in SPLITS},
        folders=description["folders"],
        quarantine=read_quarantine(folder)[: description["quarantined"]],
        val_lost=description["val_lost"],
    )
