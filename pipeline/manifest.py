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
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import replacing
from common.progress import say, track
from pipeline.headers import Header, read_header

SPLITS = ("train", "val")
_VERSION = 1
_FOLDER_NAME = ".vgg-manifest"

_FILES_A_CHUNK = 512
_FILES_WORTH_A_POOL = 8192  # below, starting worker processes takes longer than reading the headers


class Table:
    """The images of one split, memory-mapped: nothing is read until rows are asked for, and then only those rows.

    root: the data folder. rows: structured array with the fields path (uint8, relative to root, padded on its left with
    "/"), label, height, width (int32; pixels, as in the file's header, EXIF rotation not applied) and bytes (int64).
    """

    def __init__(self, root: Path, rows: np.ndarray) -> None:
        self._rows = rows.view(np.ndarray)  # a memmap subclass would make every small slice slower
        self._prefix = np.frombuffer(os.fsencode(os.path.abspath(root)) + b"/", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> "TableRows":
        """Copy these rows (int64 [n]) out of the table."""
        chosen = self._rows[rows]
        names = np.empty((len(rows), len(self._prefix) + chosen["path"].shape[1]), dtype=np.uint8)
        names[:, : len(self._prefix)] = self._prefix
        names[:, len(self._prefix) :] = chosen["path"]
        return TableRows(
            names=names,
            labels=chosen["label"].astype(np.int64),
            sizes=np.stack((chosen["height"], chosen["width"]), axis=1).astype(np.int64),
        )


class TableRows(NamedTuple):
    """Some rows of a Table."""

    names: np.ndarray
    """uint8 [n, W]: absolute paths. "/" pads on the left of the relative part: a//b is the same path as a/b."""
    labels: np.ndarray
    """int64 [n]"""
    sizes: np.ndarray
    """int64 [n, 2]: height and width of the source in pixels."""


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
    train: Table
    val: Table


def open_manifest(root: Path, *, rescan: bool = False) -> Manifest:
    """Open the manifest of a data folder; scan the folder first where there is none, or where the folder changed.

    Raises UserError: no such folder, no train/ or val/, classes that differ, a class without a readable image.
    """
    root = Path(root)
    _check_layout(root)
    manifest = None if rescan else _find_current(root)
    if manifest is None:
        manifest = _scan(root)
    if manifest.quarantined:
        say(
            f"{manifest.quarantined:,} files cannot be decoded and are left out: see {manifest.folder / 'quarantine.tsv'}"
        )
    return manifest


def load_manifest(root: Path, folder: Path) -> Manifest:
    """Open the manifest that another process has just opened or made in `folder`, without looking at the data folder."""
    manifest = _load(Path(root), folder, check_changes=False)
    if manifest is None:
        raise UserError(
            f"the manifest of {root} in {folder} cannot be read here; is that folder shared by all machines?"
        )
    return manifest


def add_to_quarantine(manifest: Manifest, reasons: dict[str, str]) -> None:
    """Append files (paths with reasons) that turned out at run time not to be decodable to quarantine.tsv."""
    lines = [
        f"{_printable(os.path.relpath(path, manifest.root.absolute()))}\t{_printable(reason)}\n"
        for path, reason in reasons.items()
    ]
    with open(manifest.folder / "quarantine.tsv", "ab") as file:  # whole lines at once: other ranks append too
        file.write("".join(lines).encode("utf-8", "backslashreplace"))


def cache_folder() -> Path:
    """The folder for what this project keeps outside the data folders: $XDG_CACHE_HOME/vgg-dali or ~/.cache/vgg-dali."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgg-dali"


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
        train=Table(root, tables["train"]),
        val=Table(root, tables["val"]),
    )


def _modification_times(root: Path, folders: Iterable[str]) -> dict[str, int]:
    return {folder: os.stat(root / folder).st_mtime_ns for folder in folders}


# ---- scanning ----------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    files: list[tuple[str, int]]
    """Path relative to the data folder, label."""
    folders: dict[str, int]
    """Path relative to the data folder, modification time in ns."""


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one that holds train/<class>/* and val/<class>/*")
    for split in SPLITS:
        if not (root / split).is_dir():
            raise UserError(f"--data {root}: has no folder {split}/; train/<class>/* and val/<class>/* are needed")


def _scan(root: Path) -> Manifest:
    classes = _class_names(root)
    listings = {split: _list_split(root, split, classes) for split in SPLITS}
    total = sum(len(listing.files) for listing in listings.values())
    say(f"scanning {total:,} files in {root} (once; later starts use the manifest)")

    quarantine: list[tuple[str, str]] = []
    tables: dict[str, np.ndarray] = {}
    for split, listing in listings.items():
        headers = _read_headers(root, [path for path, _ in listing.files], label=f"scanning {split}")
        good: list[tuple[str, int, Header]] = []
        for (path, label), header in zip(listing.files, headers, strict=True):
            if header.reason:
                quarantine.append((path, header.reason))
            else:
                good.append((path, label, header))
        _check_no_empty_class(root, split, classes, (label for _, label, _ in good))
        tables[split] = _build_table(good)

    folders = {path: time for listing in listings.values() for path, time in listing.folders.items()}
    folder = _write(root, classes, tables, folders, quarantine)
    return load_manifest(root, folder)


def _class_names(root: Path) -> list[str]:
    names = {}
    for split in SPLITS:
        with os.scandir(root / split) as entries:
            names[split] = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        if not names[split]:
            raise UserError(f"{root / split}: holds no class folders; {split}/<class>/* is needed")
    for one, other in (SPLITS, SPLITS[::-1]):
        if extra := sorted(names[one] - names[other]):
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"--data {root}: classes differ: {shown} in {one}/ but not in {other}/")
    return sorted(names["train"])


def _list_split(root: Path, split: str, classes: list[str]) -> Listing:
    listing = Listing([], {})
    listing.folders[split] = os.stat(root / split).st_mtime_ns
    for label, name in enumerate(classes):
        _list_folder(root, f"{split}/{name}", label, listing, ancestors=())
    return listing


def _list_folder(root: Path, path: str, label: int, listing: Listing, ancestors: tuple) -> None:
    status = os.stat(root / path)
    if (status.st_dev, status.st_ino) in ancestors:
        return  # a symbolic link back to a folder above
    listing.folders[path] = status.st_mtime_ns  # taken before listing, so that a file added meanwhile shows
    with os.scandir(root / path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                inside = (*ancestors, (status.st_dev, status.st_ino))
                _list_folder(root, f"{path}/{entry.name}", label, listing, inside)
            else:
                listing.files.append((f"{path}/{entry.name}", label))


def _check_no_empty_class(root: Path, split: str, classes: list[str], labels: Iterable[int]) -> None:
    if missing := sorted(set(range(len(classes))) - set(labels)):
        raise UserError(f"{root / split / classes[missing[0]]}: class folder without an image that can be decoded")


def _read_headers(root: Path, paths: list[str], label: str) -> Iterator[Header]:
    chunks = [(root, paths[first : first + _FILES_A_CHUNK]) for first in range(0, len(paths), _FILES_A_CHUNK)]
    if len(paths) < _FILES_WORTH_A_POOL:
        results: Iterable[list[Header]] = map(_read_chunk, chunks)
        yield from _flatten(track(results, total=len(paths), label=label, unit="files", weight=_FILES_A_CHUNK))
        return
    # "spawn": a fork of a process in which torch's and DALI's threads run can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        results = pool.map(_read_chunk, chunks)
        yield from _flatten(track(results, total=len(paths), label=label, unit="files", weight=_FILES_A_CHUNK))


def _flatten(chunks: Iterable[list[Header]]) -> Iterator[Header]:
    for chunk in chunks:
        yield from chunk


def _read_chunk(chunk: tuple[Path, list[str]]) -> list[Header]:
    root, paths = chunk
    return [read_header(root / path) for path in paths]


# ---- writing -----------------------------------------------------------------------------------------------------


def _build_table(images: list[tuple[str, int, Header]]) -> np.ndarray:
    names = [os.fsencode(path) for path, _, _ in images]
    width = max(map(len, names))
    fields = [("path", "u1", (width,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4"), ("bytes", "<i8")]
    table = np.zeros(len(images), dtype=fields)
    padded = b"".join(name.rjust(width, b"/") for name in names)
    table["path"] = np.frombuffer(padded, dtype=np.uint8).reshape(len(images), width)
    table["label"] = [label for _, label, _ in images]
    for field in ("height", "width", "bytes"):
        table[field] = [getattr(header, field) for _, _, header in images]
    return table


def _write(
    root: Path,
    classes: list[str],
    tables: dict[str, np.ndarray],
    folders: dict[str, int],
    quarantine: list[tuple[str, str]],
) -> Path:
    """Write all files, manifest.json last, into the first possible folder that can be written; return that folder."""
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for split in SPLITS:
        digest.update(tables[split].data)
    fingerprint = digest.hexdigest()
    table_names = {split: f"{split}-{fingerprint}.npy" for split in SPLITS}
    description = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "classes": classes,
        "images": {split: len(tables[split]) for split in SPLITS},
        "quarantined": len(quarantine),
        "tables": table_names,
        "folders": folders,
    }
    lines = ["path\treason", *("\t".join(_printable(text) for text in row) for row in quarantine)]
    problems = []
    for folder in _possible_folders(root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                with replacing(folder / table_names[split]) as file:
                    np.save(file, tables[split])
            with replacing(folder / "quarantine.tsv") as file:
                file.write(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
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
    reasons = Counter(line.split("\t")[1] for line in (manifest.folder / "quarantine.tsv").read_text().splitlines()[1:])
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
