"""The scan of a data folder: which files there are, and what their headers say."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.orphans import end_with_parent
from common.process import out_of_ctrl_c, usable_cores
from common.progress import printable, say, track
from pipeline.headers import FORMATS, Header, read_header

SPLITS = ("train", "val")

# Those of torchvision's ImageFolder, and two more.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2")

_FILES_A_CHUNK = 512
_FILES_WORTH_A_POOL = 8192  # below, starting worker processes takes longer than reading the headers


class Scan(NamedTuple):
    """What a scan finds."""

    classes: list[str]
    """Class names in label order (sorted)."""
    tables: dict[str, np.ndarray]
    """For each split, the rows of a FileTable."""
    folders: dict[str, int]
    """Every folder that was listed, relative to the data folder, with its modification time in ns."""
    quarantine: list[tuple[str, str]]
    """Files that cannot be used, relative to the data folder and printable, each with the reason."""
    val_lost: int
    """Images of val that cannot be used. Files that do not say by their extension that they are images do not count."""


class Listing(NamedTuple):
    files: list[tuple[str, int]]
    """Path relative to the data folder, label."""
    folders: dict[str, int]
    """Path relative to the data folder, modification time in ns."""


def check_layout(root: Path) -> None:
    """Raise UserError unless the folder is there and holds train/ and val/."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one that holds train/<class>/* and val/<class>/*")
    for split in SPLITS:
        if not (root / split).is_dir():
            raise UserError(f"--data {root}: has no folder {split}/; train/<class>/* and val/<class>/* are needed")


def scan(root: Path) -> Scan:
    """List the folder's files and read their headers. Raises UserError: see open_manifest."""
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
                quarantine.append((printable(path), printable(header.reason)))
            else:
                good.append((path, label, header))
        check_no_empty_class(root, split, classes, [label for _, label, _ in good], quarantine)
        tables[split] = build_table(good)
    folders = {path: time for listing in listings.values() for path, time in listing.folders.items()}
    val_lost = sum(path.startswith("val/") and path.lower().endswith(IMAGE_EXTENSIONS) for path, _ in quarantine)
    return Scan(classes=classes, tables=tables, folders=folders, quarantine=quarantine, val_lost=val_lost)


def check_no_empty_class(
    root: Path, split: str, classes: list[str], labels: Iterable[int], quarantine: list[tuple[str, str]]
) -> None:
    """Raise UserError unless each class has a label among these: its folder's files are all in the quarantine, if any."""
    missing = sorted(set(range(len(classes))) - set(labels))
    if not missing:
        return
    folder = f"{split}/{classes[missing[0]]}"
    reasons = Counter(reason for path, reason in quarantine if path.startswith(printable(folder) + "/"))
    found = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common()) or "no files at all"
    more = f" ({len(missing) - 1:,} more such folders)" if len(missing) > 1 else ""
    raise UserError(
        f"{root / printable(folder)}: class folder without an image that can be decoded: {found}{more}; "
        "put images in, or remove the class from train/ and val/"
    )


def _class_names(root: Path) -> list[str]:
    names = {}
    for split in SPLITS:
        with os.scandir(root / split) as entries:
            names[split] = {entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith(".")}
        if not names[split]:
            raise UserError(f"{root / split}: holds no class folders; {split}/<class>/* is needed")
    for one, other in (SPLITS, SPLITS[::-1]):
        if extra := sorted(names[one] - names[other]):
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"--data {root}: classes differ: {shown} in {one}/ but not in {other}/")
    return sorted(names["train"])


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, say: its header will not be read either, and the reason then says why


def _list_split(root: Path, split: str, classes: list[str]) -> Listing:
    listing = Listing([], {})
    listing.folders[split] = os.stat(root / split).st_mtime_ns
    above = tuple((status.st_dev, status.st_ino) for status in (os.stat(root), os.stat(root / split)))
    for label, name in enumerate(classes):
        try:
            _list_folder(root, f"{split}/{name}", label, listing, ancestors=above)
        except OSError as error:
            cure = (
                "make it readable for this user" if isinstance(error, PermissionError) else "mend that, and start again"
            )
            raise UserError(f"{printable(str(error.filename))}: cannot be listed ({error.strerror}); {cure}") from error
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
            if _is_folder(entry):
                inside = (*ancestors, (status.st_dev, status.st_ino))
                _list_folder(root, f"{path}/{entry.name}", label, listing, inside)
            else:
                listing.files.append((f"{path}/{entry.name}", label))


def _read_headers(root: Path, paths: list[str], label: str) -> Iterator[Header]:
    chunks = [(root, paths[first : first + _FILES_A_CHUNK]) for first in range(0, len(paths), _FILES_A_CHUNK)]
    if len(paths) < _FILES_WORTH_A_POOL:
        results: Iterable[list[Header]] = map(_read_chunk, chunks)
        yield from _flatten(track(results, total=len(paths), label=label, unit="files", weight=_FILES_A_CHUNK))
        return
    # "spawn": a fork of a process in which torch's and DALI's threads run can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), mp_context=context, initializer=end_with_parent) as pool:
        with out_of_ctrl_c():  # which goes to all of them, and is for this process to handle
            results = pool.map(_read_chunk, chunks)
        yield from _flatten(track(results, total=len(paths), label=label, unit="files", weight=_FILES_A_CHUNK))


def _flatten(chunks: Iterable[list[Header]]) -> Iterator[Header]:
    for chunk in chunks:
        yield from chunk


def _read_chunk(chunk: tuple[Path, list[str]]) -> list[Header]:
    root, paths = chunk
    return [read_header(root / path) for path in paths]


def build_table(images: list[tuple[str, int, Header]]) -> np.ndarray:
    """The rows of a FileTable, of images by their path relative to its root, label and header."""
    names = [os.fsencode(path) for path, _, _ in images]
    width = max(map(len, names))
    fields = [("path", "u1", (width,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4"), ("bytes", "<i8")]
    table = np.zeros(len(images), dtype=[*fields, ("format", "u1")])
    padded = b"".join(name.rjust(width, b"/") for name in names)
    table["path"] = np.frombuffer(padded, dtype=np.uint8).reshape(len(images), width)
    table["label"] = [label for _, label, _ in images]
    for field in ("height", "width", "bytes"):
        table[field] = [getattr(header, field) for _, _, header in images]
    table["format"] = [FORMATS.index(header.format) for _, _, header in images]
    return table
