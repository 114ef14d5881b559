"""Images that are kept as pixels: nothing has to be decoded, and only the rows that a window needs are read.

In a shard, such an image is a binary PPM file, which other programs open like any image: a header of three lines, and behind it
the pixels, row by row, three bytes each. Only the image's size varies in the header:

    P6
    <width> <height>
    255

The index has the sizes, so it is known where each row lies before anything is read. The header is read with the rows all the
same, and tar's header in front of it, which begins with the image's name, <class>/…: where either is another one, these are not
the pixels that the index means. Images of one size make shards of one length, which nothing else would tell apart.
"""

import threading
import weakref
from collections.abc import Sequence
from tarfile import BLOCKSIZE, LENGTH_NAME
from typing import NamedTuple

import numpy as np

from pipeline.shards.storage import Storage


class Pixels(NamedTuple):
    """The windows of a batch's images."""

    windows: list[np.ndarray]
    """uint8 [height, width, 3] each; of a damaged image, anything."""
    damaged: dict[int, str]
    """The indices of those, with the reasons."""


class PixelReader:
    """Reads windows of the images in shards, from any number of threads."""

    def __init__(self, storage: Storage, classes: Sequence[str]) -> None:
        """classes: names in label order."""
        self._storage = storage
        self._beginnings = [f"{name}/".encode("utf-8", "surrogateescape")[:LENGTH_NAME] for name in classes]
        self._free: list[np.ndarray] = []
        self._of_thread = threading.local()

    def batch(self, shape: np.ndarray) -> Pixels:
        """Windows of these sizes (int [n, 2]), to be read; their memory is used again when nobody holds any of them any more.

        New memory would take as long as reading into it: the kernel fills it with zeros.
        """
        ends = np.cumsum(3 * shape.prod(axis=1, dtype=np.int64))
        memory = self._free.pop() if self._free else np.empty(0, dtype=np.uint8)
        if len(memory) < ends[-1]:
            memory = np.empty(ends[-1] * 5 // 4, dtype=np.uint8)  # batches differ
        whole = np.frombuffer(memory.data, dtype=np.uint8)  # every window holds this, and nothing else does
        weakref.finalize(whole, self._free.append, memory).atexit = False
        parts = zip(np.split(whole, ends), shape.tolist(), strict=False)
        return Pixels([part.reshape(*sides, 3) for part, sides in parts], {})

    def read(self, name: str, source: np.ndarray, start: np.ndarray, targets: list[tuple[Pixels, int]]) -> None:
        """Read windows of the images of shard `name`. Raises DataSourceError.

        source: int64 [n, 5], as ShardTable has it; offsets ascend. start: int [n, 2], first pixel (y, x) of each window, which
        lies within its image. targets: the batch of each window, and its index there.
        """
        windows = [pixels.windows[index] for pixels, index in targets]
        # Whole rows are read, since their bytes lie together; of narrower windows into memory that stays in the core's cache.
        most = 3 * sum(len(window) * width for window, width in zip(windows, source[:, 3].tolist(), strict=True))
        scratch, used = self._scratch(most), 0
        offsets, memory, expected, parts = [], [], [], []
        for window, (_, offset, height, width, label), (top, left) in zip(
            windows, source.tolist(), start.tolist(), strict=True
        ):
            rows, columns, _ = window.shape
            whole = window
            if columns < width:
                whole = scratch[used : used + 3 * rows * width].reshape(rows, width, 3)
                used += whole.size
                parts.append((window, whole[:, left : left + columns]))
            header = _header(height, width)
            expected.append((self._beginnings[label], header))
            offsets += [offset - BLOCKSIZE, offset + len(header) + 3 * width * top]
            memory += [memoryview(bytearray(BLOCKSIZE + len(header))), whole.reshape(-1).data]
        beyond = self._storage.read(name, offsets, memory)
        for window, part in parts:
            window[:] = part
        for n, (pixels, index) in enumerate(targets):
            if not beyond.isdisjoint((2 * n, 2 * n + 1)):
                pixels.damaged[index] = "beyond the end of its shard"
            elif memory[2 * n][BLOCKSIZE:] != expected[n][1]:
                pixels.damaged[index] = "not the PPM file that the index says"
            elif memory[2 * n][: len(expected[n][0])] != expected[n][0]:
                pixels.damaged[index] = "of another class than the index says: this is another shard"

    def _scratch(self, length: int) -> np.ndarray:
        """Memory of this thread, uint8 [length or more]."""
        found = getattr(self._of_thread, "memory", None)
        if found is None or len(found) < length:
            found = self._of_thread.memory = np.empty(length, dtype=np.uint8)
        return found


def ppm(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3]."""
    return _header(*image.shape[:2]) + image.tobytes()


def ppm_bytes(sizes: np.ndarray) -> np.ndarray:
    """The lengths of the files of images of these sizes (int64 [n, 2], of 1–99,999 pixels a side): int64 [n]."""
    more_digits = (sizes[:, :, None] >= 10 ** np.arange(1, 5)).sum(axis=(1, 2))
    return len(_header(1, 1)) + more_digits + 3 * sizes.prod(axis=1)


def _header(height: int, width: int) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height)
