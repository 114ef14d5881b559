"""Images that are kept as pixels: nothing has to be decoded, and only the rows that a window needs are read.

In a shard, such an image is a binary PPM file, which other programs open like any image: a header of three lines, and behind it
the pixels, row by row, three bytes each. Only the image's size varies in the header:

    P6
    <width> <height>
    255

The index has the sizes, so it is known where each row lies before anything is read. The header is read with the rows all the
same: where it is another one, these are not the pixels that the index means.
"""

from typing import NamedTuple

import numpy as np

from pipeline.shards.storage import Storage

_NOT_THERE = np.zeros((1, 1, 3), dtype=np.uint8)


class Pixels(NamedTuple):
    """The windows of a batch's images."""

    windows: list[np.ndarray]
    """uint8 [height, width, 3] each; one black pixel where an image is damaged."""
    damaged: dict[int, str]
    """The indices of those, with the reasons."""

    @classmethod
    def of(cls, images: int) -> "Pixels":
        """A batch that read_windows() has still to fill in."""
        return cls([_NOT_THERE] * images, {})


def ppm(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3]."""
    return _header(*image.shape[:2]) + image.tobytes()


def ppm_bytes(sizes: np.ndarray) -> np.ndarray:
    """The lengths of the files of images of these sizes (int64 [n, 2], of 1–99,999 pixels a side): int64 [n]."""
    more_digits = (sizes[:, :, None] >= 10 ** np.arange(1, 5)).sum(axis=(1, 2))
    return len(_header(1, 1)) + more_digits + 3 * sizes.prod(axis=1)


def read_windows(
    storage: Storage,
    name: str,
    source: np.ndarray,
    start: np.ndarray,
    shape: np.ndarray,
    targets: list[tuple[Pixels, int]],
) -> None:
    """Read windows of the images of shard `name` into their places.

    source: int64 [n, 4], as ShardTable has it; offsets ascend. start, shape: int [n, 2], first pixel (y, x) and size of each
    window, which lies within its image. targets: the batch of each window, and its index there. Raises DataSourceError.
    """
    offsets, memory, parts = [], [], []
    for (_, offset, height, width), (top, left), (rows, columns) in zip(
        source.tolist(), start.tolist(), shape.tolist(), strict=True
    ):
        expected = _header(height, width)
        header, window = bytearray(len(expected)), np.empty((rows, columns, 3), dtype=np.uint8)
        # A window's rows lie together in the file with all of their columns. Those of a narrower window go through memory that
        # is used again and again, and so stays in the core's cache.
        whole = window if columns == width else np.empty((rows, width, 3), dtype=np.uint8)
        offsets += [offset, offset + len(expected) + 3 * width * top]
        memory += [memoryview(header), whole.reshape(-1).data]
        parts.append((expected, header, window, whole[:, left : left + columns]))
    beyond = storage.read(name, offsets, memory)
    for n, ((pixels, index), (expected, header, window, part)) in enumerate(zip(targets, parts, strict=True)):
        if not beyond.isdisjoint((2 * n, 2 * n + 1)):
            pixels.damaged[index] = "beyond the end of its shard"
        elif header != expected:
            pixels.damaged[index] = "not the PPM file that the index says"
        else:
            if part.base is not window:
                window[:] = part
            pixels.windows[index] = window


def _header(height: int, width: int) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height)
