"""python -m pipeline.manifest DATA [--rescan]: the memory-mapped table of a data set's images.

DATA is a folder in torchvision's ImageFolder form, DATA/train/<class>/* and DATA/val/<class>/*. It is scanned once; the
result is kept in DATA/.vgg-manifest or, where DATA cannot be written, in the user's cache folder:

    manifest.json        classes, fingerprint, the folders' modification times; names the two tables; written last
    train-….npy, val-….npy   one row an image (ROW_FIELDS), memory-mapped, shared by all ranks
    quarantine.tsv       files left out, each with the reason

The next start costs one stat per folder, whatever the number of images. A file overwritten in place does not change its
folder's time: then ask for --rescan.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import cache_folder, replacing
from common.progress import say
from pipeline.scan import SPLITS, Scan, check_layout, scan
from pipeline.tables import FileTable

_VERSION = 1
_FOLDER_NAME = ".vgg-manifest"
QUARANTINE = "quarantine.tsv"


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
    """Changes whenever a path, a label, a size in pixels or in bytes, or the set of classes changes."""
    quarantined: int
    """Number of files left out; folder/quarantine.tsv names each with its reason."""
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
        manifest = load_manifest(root, _write(root, scan(root)))
    if manifest.quarantined:
        say(f"{manifest.quarantined:,} files cannot be decoded and are left out: see {manifest.folder / QUARANTINE}")
    return manifest


def load_manifest(root: Path, folder: Path) -> Manifest:
    """Open the manifest that another process has just opened or made in `folder`, without looking at the data folder."""
    manifest = _load(Path(root), folder, check_changes=False)
    if manifest is None:
        raise UserError(
            f"the manifest of {root} in {folder} cannot be read here; is that folder shared by all machines?"
        )
    return manifest


def add_to_quarantine(folder: Path, root: str | Path, reasons: dict[str, str]) -> None:
    """Append images of the data set `root` (names with reasons) that turned out not to be decodable to quarantine.tsv."""
    with open(folder / QUARANTINE, "ab") as file:  # whole lines at once: other ranks append too
        file.write(quarantine_lines(root, reasons))


def quarantine_lines(root: str | Path, reasons: dict[str, str]) -> bytes:
    """Images (names with reasons) as lines of quarantine.tsv, in which names are relative to the data set."""
    beginning = f"{root if '://' in str(root) else os.path.abspath(root)}/"
    lines = [f"{_printable(name.removeprefix(beginning))}\t{_printable(reason)}\n" for name, reason in reasons.items()]
    return "".join(lines).encode("utf-8", "backslashreplace")


# ---- loading -----------------------------------------------------------------------------------------------------


def _possible_folders(root: Path) -> tuple[Path, Path]:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()
    return root / _FOLDER_NAME, cache_folder() / "manifests" / name


def _find_current(root: Path) -> Manifest | None:
    found = (_load(root, folder, check_changes=True) for folder in _possible_folders(root))
    return next(filter(None, found), None)


def _load(root: Path, folder: Path, *, check_changes: bool) -> Manifest | None:
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
        train=FileTable(root, tables["train"]),
        val=FileTable(root, tables["val"]),
    )


def _modification_times(root: Path, folders: Iterable[str]) -> dict[str, int]:
    return {folder: os.stat(root / folder).st_mtime_ns for folder in folders}


# ---- writing -----------------------------------------------------------------------------------------------------


def _write(root: Path, found: Scan) -> Path:
    """Write all files, manifest.json last, into the first possible folder that can be written; return that folder."""
    digest = hashlib.blake2b(json.dumps(found.classes).encode(), digest_size=16)
    for split in SPLITS:
        digest.update(found.tables[split].data)
    fingerprint = digest.hexdigest()
    table_names = {split: f"{split}-{fingerprint}.npy" for split in SPLITS}
    description = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "classes": found.classes,
        "images": {split: len(found.tables[split]) for split in SPLITS},
        "quarantined": len(found.quarantine),
        "tables": table_names,
        "folders": found.folders,
    }
    problems = []
    for folder in _possible_folders(root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                with replacing(folder / table_names[split]) as file:
                    np.save(file, found.tables[split])
            with replacing(folder / QUARANTINE) as file:
                file.write(b"path\treason\n" + quarantine_lines(root, dict(found.quarantine)))
            with replacing(folder / "manifest.json") as file:
                file.write(json.dumps(description).encode())
        except OSError as error:
            problems.append(f"{folder} ({error.strerror})")
            continue
        for stale in folder.glob("*.npy"):
            if stale.name not in table_names.values():
                stale.unlink(missing_ok=True)
        return folder
    raise UserError(f"no place for the manifest of {root}: cannot write {' nor '.join(problems)}")


def _printable(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


# ---- command line ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.manifest", description="Scan a data folder, print a summary."
    )
    parser.add_argument("data", type=Path, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--rescan", action="store_true", help="scan even if no folder changed since the last scan")
    arguments = parser.parse_args(argv)
    try:
        manifest = open_manifest(arguments.data, rescan=arguments.rescan)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    reasons = Counter(line.split("\t")[1] for line in (manifest.folder / QUARANTINE).read_text().splitlines()[1:])
    for reason, count in reasons.most_common():
        say(f"{count:8,} left out: {reason}")
    result = {
        "data": str(manifest.root),
        "manifest": str(manifest.folder),
        "classes": len(manifest.classes),
        "train": len(manifest.train),
        "val": len(manifest.val),
        "quarantined": manifest.quarantined,
        "fingerprint": manifest.fingerprint,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
