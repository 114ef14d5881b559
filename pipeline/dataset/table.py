"""Tables of images: one row each, memory-mapped, shared by all ranks. Nothing is read until rows are asked for."""

import mmap
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from pipeline.shards.storage import Storage

SHARD_ROW = np.dtype(
    [("shard", "<i4"), ("bytes", "<i4"), ("offset", "<i8"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
"""A row of a prepared data set's index: where the image file lies in its shard, its label, its size in pixels."""

TABLE_NAMES = r"(?:train|val)-[0-9a-f]{32}\.npy"
"""A regular expression for the names of tables' files: each has the fingerprint of its data set."""
SHARD_NAMES = r"(?:train|val)-\d{6,}\.tar"
"""And for those of shards."""

_RESIDENT_BYTES = 256 << 20  # of a mapped table that may stay in the process's memory, and be read ahead


class TableRows(NamedTuple):
    """Some rows of a table."""

    source: np.ndarray
    """Where the image's bytes lie: [n, …], as the kind of table has it."""
    labels: np.ndarray
    """int64 [n]"""
    sizes: np.ndarray
    """int64 [n, 2]: height and width of the image in pixels, as in the file's header, EXIF rotation not applied."""


class _Rows:
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
        self._rows = _Rows(rows)
        self._prefix = np.frombuffer(os.fsencode(os.path.abspath(root)) + b"/", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> TableRows:
        chosen = self._rows.take(rows)
        names = np.empty((len(rows), len(self._prefix) + chosen["path"].shape[1]), dtype=np.uint8)
        names[:, : len(self._prefix)] = self._prefix
        names[:, len(self._prefix) :] = chosen["path"]
        return TableRows(source=names, labels=chosen["label"].astype(np.int64), sizes=_sizes(chosen))

    def name(self, source: np.ndarray) -> str:
        return os.path.normpath(os.fsdecode(source.tobytes()))

    def path(self, row: int) -> Path:
        """The path of one row's file."""
        return Path(self.name(self.read(np.array([row])).source[0]))


class ShardTable:
    """Images packed into shards, the tar files that pipeline.prepare writes.

    storage: where the shards lie. rows: SHARD_ROW, in the order in which they lie in the shards. shard_images, shard_bytes:
    int64 [shards], the images in each and its size; classes: how many there are.
    A source is (shard, offset, bytes), int64 [3].
    """

    def __init__(
        self,
        storage: Storage,
        split: str,
        rows: np.ndarray,
        *,
        shard_images: np.ndarray,
        shard_bytes: np.ndarray,
        classes: int,
    ) -> None:
        self.storage, self.split, self.shard_images = storage, split, shard_images
        self._shard_bytes, self._classes = shard_bytes, classes
        self._rows = _Rows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> TableRows:
        """Raises UserError where a row cannot be: nobody has looked at all of them."""
        chosen = self._rows.take(rows)
        if wrong := what_is_wrong(chosen, shard_bytes=self._shard_bytes, classes=self._classes):
            raise UserError(
                f"--data {self.storage.url}: its index is damaged ({self.split}: {wrong}); prepare or copy the data set anew"
            )
        source = np.stack([chosen[field].astype(np.int64) for field in ("shard", "offset", "bytes")], axis=1)
        return TableRows(source=source, labels=chosen["label"].astype(np.int64), sizes=_sizes(chosen))

    def name(self, source: np.ndarray) -> str:
        shard, offset, _ = source.tolist()
        header = bytearray(_TAR_BLOCK)
        self.storage.read(self.shard_name(shard), [offset - _TAR_BLOCK], [memoryview(header)])
        member = header[:100].rstrip(b"\0").decode("utf-8", "replace")  # the field "name" of every tar format
        return f"{self.storage.url}/{self.shard_name(shard)}: {member}"

    def shard_name(self, shard: int) -> str:
        return shard_name(self.split, shard)


_TAR_BLOCK = 512
_LONGEST_JPEG_SIDE = 65_535


def shard_name(split: str, shard: int) -> str:
    """The file name of a shard."""
    return f"{split}-{shard:06d}.tar"


def what_is_wrong(rows: np.ndarray, *, shard_bytes: np.ndarray, classes: int) -> str:
    """Which number in these rows (SHARD_ROW) cannot be, in words; "" where all can be."""
    if not len(rows):
        return ""
    shard, offset = rows["shard"], rows["offset"]
    if shard.min() < 0 or shard.max() >= len(shard_bytes):
        return "an image in a shard that is not there"
    if rows["bytes"].min() < 1 or offset.min() < _TAR_BLOCK or (offset > shard_bytes[shard] - rows["bytes"]).any():
        return "an image that does not lie within its shard"
    if rows["label"].min() < 0 or rows["label"].max() >= classes:
        return f"a label beyond the {classes:,} classes"
    sides = (rows["height"], rows["width"])
    if min(side.min() for side in sides) < 1 or max(side.max() for side in sides) > _LONGEST_JPEG_SIDE:
        return f"an image whose sides are not 1–{_LONGEST_JPEG_SIDE} pixels"
    return ""


def _sizes(chosen: np.ndarray) -> np.ndarray:
    return np.stack((chosen["height"], chosen["width"]), axis=1).astype(np.int64)
