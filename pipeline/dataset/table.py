"""Tables of images: one row each, memory-mapped, shared by all ranks. Nothing is read until rows are asked for."""

import mmap
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

TABLE_NAMES = r"(?:train|val)-[0-9a-f]{32}\.npy"
"""A regular expression for the names of tables' files: each has the fingerprint of its data set."""

_RESIDENT_BYTES = 256 << 20  # of a mapped table that may stay in the process's memory, and be read ahead


class TableRows(NamedTuple):
    """Some rows of a table."""

    source: np.ndarray
    """Where the image's bytes lie: [n, …], as the kind of table has it."""
    labels: np.ndarray
    """int64 [n]"""
    sizes: np.ndarray
    """int64 [n, 2]: height and width of the image in pixels, as in the file's header, EXIF rotation not applied."""


class Rows:
    """The rows of a table, in memory or memory-mapped (as np.load gives it), of which only those asked for are touched."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows.view(np.ndarray)  # a memmap subclass would make every small slice slower
        self._map = rows.base if isinstance(rows.base, mmap.mmap) and rows.nbytes > _RESIDENT_BYTES else None
        if self._map:
            self._map.madvise(mmap.MADV_RANDOM)  # else each row costs the reading of 128 KB: 200 times slower, seen

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these rows (int64 [n])."""
        chosen = self._rows[rows]
        if self._map:
            # Its pages stay in the system's cache, but do not add up to the whole table in this process.
            self._map.madvise(mmap.MADV_DONTNEED)
        return chosen


class Table(Protocol):
    """The images of one split."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> TableRows:
        """Copy these rows (int64 [n]) out of the table."""

    def name(self, source: np.ndarray) -> str:
        """What to call an image in a message, by its `source`."""


class FileTable:
    """Images in files of their own.

    root: the data folder. rows: structured array with the fields path (uint8, relative to root, padded on its left with
    "/"), label, height, width (int32) and bytes (int64).
    A source is an absolute path, uint8 [W]; "/" pads on the left of the relative part: a//b is the same path as a/b.
    """

    def __init__(self, root: Path, rows: np.ndarray) -> None:
        self._rows = Rows(rows)
        self._prefix = np.frombuffer(os.fsencode(os.path.abspath(root)) + b"/", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> TableRows:
        chosen = self._rows.take(rows)
        names = np.empty((len(rows), len(self._prefix) + chosen["path"].shape[1]), dtype=np.uint8)
        names[:, : len(self._prefix)] = self._prefix
        names[:, len(self._prefix) :] = chosen["path"]
        return TableRows(source=names, labels=chosen["label"].astype(np.int64), sizes=image_sizes(chosen))

    def name(self, source: np.ndarray) -> str:
        return os.path.normpath(os.fsdecode(source.tobytes()))

    def path(self, row: int) -> Path:
        """The path of one row's file."""
        return Path(self.name(self.read(np.array([row])).source[0]))


def image_sizes(chosen: np.ndarray) -> np.ndarray:
    """Of rows with the fields height and width: int64 [n, 2]."""
    return np.stack((chosen["height"], chosen["width"]), axis=1).astype(np.int64)
