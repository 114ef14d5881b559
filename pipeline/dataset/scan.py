"""The scan of a data folder: which files there are, and what their headers say.

One function lists a folder and one judges a file (pipeline/dataset/headers.py), for the scan and for predict.py alike.
"""

import errno
import multiprocessing
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from common.errors import UserError
from common.files import is_storage_trouble
from common.parent_death import end_with_parent
from common.patience import StorageTrouble, patiently
from common.process import out_of_ctrl_c, usable_cores
from common.progress import printable, say, track
from pipeline.dataset.headers import FORMATS, Header, read_header, says_image

SPLITS = ("train", "val")

_FILES_A_CHUNK = 512
_FILES_WORTH_A_POOL = 8192  # below, starting worker processes takes longer than reading the headers
_PATIENCE_SECONDS = 10.0  # with a storage that fails
_LONGEST_SHOWN = 200  # characters of a path in a message

_LITTER = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot"),  # of a NAS
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),  # of Windows
    *("__macosx", "icon\r", "network trash folder", "temporary items", "lost+found"),  # of macOS, of ext4
}
"""Files and folders that machines put beside images, thumbnails of them too; in lower case."""

_PERMISSION = "let this user read and enter it, and enter the folders above it"
_ADVICE = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENAMETOOLONG: "put the images into fewer folders, or into folders with shorter names",
    0: "it changed meanwhile: when nobody writes there, start the same command again",  # any other error
}

T = TypeVar("T")


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
    """Images of val that cannot be used. Files that say neither by name nor by content that they are images do not count."""


class Listing(NamedTuple):
    """What lies in a folder, and in the folders below it."""

    files: list[str]
    """In the order of their names, folder by folder, relative to the folder that was asked for."""
    folders: dict[str, int]
    """Every folder, the same way, with its modification time in ns."""
    left_out: Counter[str]
    """What was not looked at, by what it is: hidden, or put there by a machine."""


def check_layout(root: Path) -> None:
    """Raise UserError unless the folder is there and holds train/ and val/."""
    if not is_folder_there(root):
        raise UserError(f"--data {root}: no such folder; give one that holds train/<class>/* and val/<class>/*")
    for split in SPLITS:
        if not is_folder_there(root / split):
            raise UserError(f"--data {root}: has no folder {split}/; train/<class>/* and val/<class>/* are needed")


def is_folder_there(path: Path) -> bool:
    """Whether a folder is there. Raises UserError where that cannot be seen."""
    try:
        return stat.S_ISDIR(_patiently(path, lambda: os.stat(path)).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except (OSError, StorageTrouble) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:  # a link to itself
            return False
        raise _cannot_be_listed(path, error) from error


def scan(root: Path) -> Scan:
    """List the folder's files and read their headers. Raises UserError: see open_manifest."""
    left_out: Counter[str] = Counter()
    classes = _class_names(root, left_out)
    folders: dict[str, int] = {}
    files: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        above = [_identity(root, ""), _identity(root, split)]
        folders[split] = above[1].st_mtime_ns
        files[split] = []
        for label, name in enumerate(classes):
            listing = list_files(root, f"{split}/{name}", above=above)
            folders |= listing.folders
            left_out += listing.left_out
            files[split] += [(path, label) for path in listing.files]
    total = sum(map(len, files.values()))
    say(f"scanning {total:,} files in {root} (once; later starts use the manifest)")
    say_left_out(left_out, root)

    quarantine: list[tuple[str, str]] = []
    tables: dict[str, np.ndarray] = {}
    val_lost = 0
    for split in SPLITS:
        headers = _read_headers(root, [path for path, _ in files[split]], label=f"scanning {split}")
        good: list[tuple[str, int, Header]] = []
        for (path, label), header in zip(files[split], headers, strict=True):
            if header.storage_failed:
                header = read_patiently(root / path)
            if header.reason:
                quarantine.append((printable(path), printable(header.reason)))
                val_lost += split == "val" and says_image(root / path)
            else:
                good.append((path, label, header))
        check_no_empty_class(root, split, classes, [label for _, label, _ in good], quarantine)
        tables[split] = build_table(good)
    return Scan(classes=classes, tables=tables, folders=folders, quarantine=quarantine, val_lost=val_lost)


def say_left_out(left_out: Counter[str], folder: Path) -> None:
    """Say in a line what was not looked at in a folder, and how many of each."""
    if left_out:
        shown = ", ".join(f"{count:,} × {what}" for what, count in left_out.most_common())
        say(f"{folder}: left out, and not counted: {shown}")


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


def _class_names(root: Path, left_out: Counter[str]) -> list[str]:
    names: dict[str, set[str]] = {}
    for split in SPLITS:
        names[split] = set()
        for entry in _entries(root, split):
            if kind := _litter(entry.name):
                left_out[kind] += 1
            elif is_folder_there(Path(entry.path)):
                names[split].add(entry.name)
            else:
                left_out["beside the class folders"] += 1
        if not names[split]:
            raise UserError(f"{root / split}: holds no class folders; {split}/<class>/* is needed")
    _check_look_alikes(root, names)
    for one, other in (SPLITS, SPLITS[::-1]):
        if extra := sorted(names[one] - names[other]):
            shown = ", ".join(map(_shown, extra[:5])) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"--data {root}: classes differ: {shown} in {one}/ but not in {other}/")
    return sorted(names["train"])


def _shown(name: str) -> str:
    return printable(name) if name == name.strip() else f'"{printable(name)}"'


def _check_look_alikes(root: Path, names: dict[str, set[str]]) -> None:
    """Raise UserError where two names differ only in their Unicode form: macOS writes é as two characters, others as one."""
    forms: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        for name in sorted(names[split]):
            before, where = forms.setdefault(unicodedata.normalize("NFC", name), (name, split))
            if before != name:
                one, other = (text.encode("unicode_escape").decode() for text in (before, name))
                raise UserError(
                    f"--data {root}: classes that look alike but differ in their Unicode form: {one} in "
                    f"{where}/, {other} in {split}/; give both folders the same name, or join them"
                )


def list_files(root: Path, start: str = "", above: Iterable[os.stat_result] = ()) -> Listing:
    """List the files in the folder root/start and below it; links are followed, to each folder once.

    above: folders that are not gone into again, should a link lead there. Hidden files and folders, and what a NAS or a desktop
    puts beside images, are left out. Raises UserError where a folder cannot be listed.
    """
    listing = Listing([], {}, Counter())
    seen = {(status.st_dev, status.st_ino) for status in above}

    def entries(path: str) -> Iterator[os.DirEntry]:
        status = _identity(root, path)
        if (status.st_dev, status.st_ino) in seen:
            return iter(())  # a link back to a folder above, or another way to one that is listed already
        seen.add((status.st_dev, status.st_ino))
        listing.folders[path] = status.st_mtime_ns  # taken before listing, so that a file added meanwhile shows
        return iter(sorted(_entries(root, path), key=lambda entry: entry.name))

    depths = [(start, entries(start))]  # not by recursion: folders can be nested deeper than Python's calls
    while depths:
        path, remaining = depths[-1]
        entry = next(remaining, None)
        if entry is None:
            depths.pop()
            continue
        name = f"{path}/{entry.name}" if path else entry.name
        if kind := _litter(entry.name):
            listing.left_out[kind] += 1
        elif _is_folder(entry):
            depths.append((name, entries(name)))
        else:
            listing.files.append(name)
    return listing


def _litter(name: str) -> str:
    """What a file or folder is that is not looked at; "" for all others."""
    if name.startswith("."):
        return "hidden (.*)"
    lower = name.lower()
    if lower.endswith(":zone.identifier"):
        return "Zone.Identifier"  # where Windows notes that a file was downloaded
    return printable(name) if lower in _LITTER else ""


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, say: its header will not be read either, and the reason then says why


def _identity(root: Path, path: str) -> os.stat_result:
    try:
        return _patiently(root / path, lambda: os.stat(root / path))
    except (OSError, StorageTrouble) as error:
        raise _cannot_be_listed(root / path, error) from error


def _entries(root: Path, path: str) -> list[os.DirEntry]:
    def listed() -> list[os.DirEntry]:
        with os.scandir(root / path) as entries:
            return list(entries)

    try:
        return _patiently(root / path, listed)
    except (OSError, StorageTrouble) as error:
        raise _cannot_be_listed(root / path, error) from error


def _patiently(path: Path, ask: Callable[[], T]) -> T:
    """What a storage answers; where it fails, it is asked again for a while. Raises OSError, StorageTrouble."""

    def attempt() -> T:
        try:
            return ask()
        except OSError as error:
            if not is_storage_trouble(error):
                raise
            raise StorageTrouble(error.strerror or str(error), may_pass=True) from error

    return patiently(str(path), _PATIENCE_SECONDS, attempt)


def _cannot_be_listed(path: Path, error: OSError | StorageTrouble) -> UserError:
    shown = str(path) if len(str(path)) <= _LONGEST_SHOWN else f"{str(path)[:_LONGEST_SHOWN]} …"
    if isinstance(error, StorageTrouble):
        cause, advice = str(error), "nothing was written: once its storage answers, start the same command again"
    else:
        cause, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0, _ADVICE[0])
    return UserError(f"{shown}: cannot be listed ({cause}); {advice}")


def read_patiently(path: Path) -> Header:
    """read_header() of a file whose storage may have failed. Raises UserError where it still does."""

    def attempt() -> Header:
        header = read_header(path)
        if header.storage_failed:
            raise StorageTrouble(header.reason.removeprefix("cannot be read: "), may_pass=True)
        return header

    try:
        return patiently(str(path), _PATIENCE_SECONDS, attempt)
    except StorageTrouble as trouble:
        raise UserError(
            f"{path}: cannot be read ({trouble}), which says nothing of the image; once its storage answers, start the same "
            "command again, or remove the file"
        ) from trouble


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
