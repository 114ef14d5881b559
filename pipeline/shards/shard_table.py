"""Tables of images in shards."""

from collections.abc import Sequence
from tarfile import BLOCKSIZE, LENGTH_NAME

import numpy as np

from common.errors import UserError
from pipeline.dataset.table import Rows, TableRows, image_sizes
from pipeline.shards.raw import ppm_bytes
from pipeline.shards.storage import Storage

SHARD_ROW = np.dtype(
    [("shard", "<i4"), ("bytes", "<i4"), ("offset", "<i8"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
"""A row of a prepared data set's index: where the image file lies in its shard, its label, its size in pixels."""

SHARD_NAMES = r"(?:train|val)-\d{6,}\.tar"
"""A regular expression for the names of shards."""

LONGEST_SIDE = 65_535
"""In pixels; no JPEG has a longer one."""


class ShardTable:
    """Images packed into shards, the tar files that pipeline.prepare writes.

    storage: where the shards lie. rows: SHARD_ROW, in the order in which they lie in the shards. shard_images, shard_bytes:
    int64 [shards], the images in each and its size; classes: names in label order. is_raw: whether images are kept as pixels
    (raw.py), and not as JPEGs.
    A source is (shard, offset, bytes), int64 [3]; where images are kept as pixels, (shard, offset, height, width, label),
    int64 [5].
    """

    def __init__(
        self,
        storage: Storage,
        split: str,
        rows: np.ndarray,
        *,
        shard_images: np.ndarray,
        shard_bytes: np.ndarray,
        classes: Sequence[str],
        is_raw: bool,
    ) -> None:
        self.storage, self.split, self.shard_images, self.is_raw = storage, split, shard_images, is_raw
        self.classes, self._shard_bytes = classes, shard_bytes
        self._rows = Rows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> TableRows:
        """Raises UserError where a row cannot be: nobody has looked at all of them."""
        chosen = self._rows.take(rows)
        if wrong := what_is_wrong(chosen, shard_bytes=self._shard_bytes, classes=len(self.classes), is_raw=self.is_raw):
            raise UserError(
                f"--data {self.storage.url}: its index is damaged ({self.split}: {wrong}); prepare or copy the data set anew"
            )
        fields = ("shard", "offset", "height", "width", "label") if self.is_raw else ("shard", "offset", "bytes")
        source = np.stack([chosen[field].astype(np.int64) for field in fields], axis=1)
        return TableRows(source=source, labels=chosen["label"].astype(np.int64), sizes=image_sizes(chosen))

    def name(self, source: np.ndarray) -> str:
        shard, offset = source[:2].tolist()
        header = bytearray(BLOCKSIZE)
        self.storage.read(self.shard_name(shard), [offset - BLOCKSIZE], [memoryview(header)])
        member = header[:LENGTH_NAME].rstrip(b"\0").decode("utf-8", "replace")  # the field "name" of every tar format
        return f"{self.storage.url}/{self.shard_name(shard)}: {member}"

    def shard_name(self, shard: int) -> str:
        return shard_name(self.split, shard)


def shard_name(split: str, shard: int) -> str:
    """The file name of a shard."""
    return f"{split}-{shard:06d}.tar"


def what_is_wrong(rows: np.ndarray, *, shard_bytes: np.ndarray, classes: int, is_raw: bool) -> str:
    """Which number in these rows (SHARD_ROW) cannot be, in words; "" where all can be."""
    if not len(rows):
        return ""
    shard, offset = rows["shard"], rows["offset"]
    if shard.min() < 0 or shard.max() >= len(shard_bytes):
        return "an image in a shard that is not there"
    if rows["bytes"].min() < 1 or offset.min() < BLOCKSIZE or (offset > shard_bytes[shard] - rows["bytes"]).any():
        return "an image that does not lie within its shard"
    if rows["label"].min() < 0 or rows["label"].max() >= classes:
        return f"a label beyond the {classes:,} classes"
    sides = (rows["height"], rows["width"])
    if min(side.min() for side in sides) < 1 or max(side.max() for side in sides) > LONGEST_SIDE:
        return f"an image whose sides are not 1–{LONGEST_SIDE} pixels"
    if is_raw and (ppm_bytes(image_sizes(rows)) != rows["bytes"]).any():
        return "an image that has not the bytes of its pixels"
    return ""
