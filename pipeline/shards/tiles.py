"""JPEGs out of which a window can be cut before they are decoded, so that a decoder works on the window alone.

A JPEG's bits can only be read from the first one on: a decoder that is asked for a window reads what lies left, right and above
of it too, and a GPU's decodes all of the image. Restart markers, which the standard has for recovery from errors, make pieces
of the bits independent of each other. tiled_jpeg() puts one behind every few blocks of 16×16 pixels, here called a tile, and
keeps in a segment of the header where each tile begins. cut_to_windows() then makes a smaller JPEG of the tiles that a window
needs: the header with another height and width, the tiles' bytes, the markers numbered anew. Its pixels are the whole image's to
the last bit. To other readers, a tiled JPEG is a baseline JPEG like any other.

The segment, behind the two bytes that begin a JPEG; all numbers are big-endian, as in the rest of it:

     2  FF EF, length (uint16)     APP15: for the application's own use
     6  "vggtile\\0"
    14  height, width (uint16)     of the image in pixels
    18  uint16                     where in the file the frame header has them, the height first
    20  uint16                     width of a tile in pixels
    22  uint32 [tiles + 1]         where each tile begins, row by row; the last number is the file's length

Behind each tile there is a marker of two bytes: RST0 to RST7 (FF D0 to FF D7) in turn or, behind the last one, EOI (FF D9).
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

_BLOCK_SIDE = 16  # pixels of what a JPEG with halved chroma encodes in one go
_MOST_BLOCKS_A_TILE = 4
_MOST_TILES = 16_000  # whose places fit into a segment, which has 65,535 bytes at most
_MARGIN = 2  # pixels beside the window that its own depend on: chroma is interpolated between neighbours

_APP15 = b"\xff\xef"
_NAME = b"vggtile\0"
_NAME_AT, _NUMBERS_AT, _PLACES = 6, 14, 22  # in the file, as above
_RST0, _EOI = 0xFFD0, 0xFFD9
_ZEROS = -1


def tiled_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode uint8 [height, width, 3] as a baseline JPEG with halved chroma and optimal Huffman tables, in tiles.

    quality: 1–95. Raises ValueError or OSError where a side is too long for a JPEG (65,500 pixels).
    """
    height, width = image.shape[:2]
    rows, columns = -(-height // _BLOCK_SIDE), -(-width // _BLOCK_SIDE)
    # Markers come at equal distances, so a tile's width must divide a row's. What is left of a tile beside a window is decoded
    # in vain, while each marker costs some four bytes.
    blocks = max(n for n in range(1, _MOST_BLOCKS_A_TILE + 1) if columns % n == 0)
    if rows * columns // blocks > _MOST_TILES:
        blocks = columns
    file = io.BytesIO()
    Image.fromarray(image).save(
        file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, restart_marker_blocks=blocks
    )
    jpeg = np.frombuffer(file.getbuffer(), dtype=np.uint8)
    frame, first_tile = _parts(file.getvalue())
    is_marker = (jpeg[first_tile:-1] == 0xFF) & (jpeg[first_tile + 1 :] != 0)  # 0xFF within the bits has a 0 behind it
    places = np.concatenate(([first_tile], first_tile + np.flatnonzero(is_marker) + 2))
    length = _PLACES + 4 * len(places) - 2  # of the segment and its marker
    numbers = np.array([height, width, length + frame, blocks * _BLOCK_SIDE], dtype=">u2")
    return b"".join(
        (
            jpeg[:2].tobytes(),
            _APP15,
            (length - 2).to_bytes(2, "big"),
            _NAME,
            numbers.tobytes(),
            (places + length).astype(">u4").tobytes(),
            jpeg[2:].tobytes(),
        )
    )


def cut_to_windows(encoded: np.ndarray, start: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut the tiles that windows need out of tiled JPEGs.

    encoded: uint8 [n, W], the bytes of an image in each row, followed by anything. start, shape: int32 [n, 2], first pixel
    (y, x) and size of each window. Returns the smaller JPEGs, uint8 [n, W'], in the same form, and where each of them begins
    in the whole image, int32 [n, 2].
    A batch in which anything is not as tiled_jpeg() has written it comes back as it is: decoding will say what is wrong.
    """
    cuts = _cuts(encoded, start, shape)
    tiles = _tiles(encoded, cuts) if cuts else None
    if not cuts or not tiles:
        return encoded, np.zeros_like(start)
    return _smaller(encoded, cuts, tiles), (cuts.first * cuts.tile).astype(start.dtype)


@dataclass(frozen=True)
class _Cuts:
    """What to take of each image; int64."""

    size: np.ndarray
    """[n, 2]: height and width of the image in pixels."""
    frame: np.ndarray
    """[n]: where in the file the frame header has them."""
    tile: np.ndarray
    """[n, 2]: height and width of a tile in pixels."""
    grid: np.ndarray
    """[n, 2]: the image's tiles, down and across."""
    first: np.ndarray
    """[n, 2]: row and column of the first tile that is taken."""
    stop: np.ndarray
    """[n, 2]: of the first one behind, down and across, that is not."""
    header: np.ndarray
    """[n, 2]: where the header's part begins that is taken, behind the tiles' places, and where it ends."""


def _cuts(encoded: np.ndarray, start: np.ndarray, shape: np.ndarray) -> _Cuts | None:
    """None where an image is not tiled, or has not such a window."""
    row_bytes = encoded.shape[1]
    if row_bytes <= _PLACES or not (encoded[:, _NAME_AT:_NUMBERS_AT] == np.frombuffer(_NAME, dtype=np.uint8)).all():
        return None
    numbers = np.ascontiguousarray(encoded[:, _NUMBERS_AT:_PLACES]).view(">u2").astype(np.int64)
    if (numbers == 0).any():
        return None
    size, frame = numbers[:, :2], numbers[:, 2]
    tile = np.stack((np.full_like(frame, _BLOCK_SIDE), numbers[:, 3]), axis=1)
    grid = -(-size // tile)
    first = np.maximum(start - _MARGIN, 0) // tile
    stop = np.minimum(-(-(start + shape + _MARGIN) // tile), grid)
    places_end = _PLACES + 4 * (grid.prod(axis=1) + 1)
    if (first >= stop).any() or (places_end > row_bytes).any():
        return None
    header_end = _numbers_at(encoded, np.arange(len(encoded)) * row_bytes + _PLACES, ">u4")
    if (frame < places_end).any() or (frame + 4 > header_end).any():
        return None
    return _Cuts(size, frame, tile, grid, first, stop, np.stack((places_end, header_end), axis=1))


@dataclass(frozen=True)
class _Tiles:
    """The tiles that are taken, image by image and row by row, and the runs of tiles that lie together; int64.

    A run is a row of tiles or, where rows are taken whole, all rows.
    """

    image: np.ndarray
    """[runs]: of which image."""
    count: np.ndarray
    """[runs]: how many tiles."""
    begin: np.ndarray
    """[tiles]: where in its file each begins."""
    end: np.ndarray
    """[tiles]: where it ends, its marker included."""


def _tiles(encoded: np.ndarray, cuts: _Cuts) -> _Tiles | None:
    """None where the places or the markers are not what they should be."""
    row_bytes = encoded.shape[1]
    taken = cuts.stop - cuts.first
    has_whole_rows = taken[:, 1] == cuts.grid[:, 1]
    runs = np.where(has_whole_rows, 1, taken[:, 0])  # of each image
    image = np.repeat(np.arange(len(encoded)), runs)
    row = cuts.first[image, 0] + np.arange(len(image)) - (np.cumsum(runs) - runs)[image]
    first = row * cuts.grid[image, 1] + cuts.first[image, 1]  # a run's first tile, by its number in the image
    count = np.where(has_whole_rows, taken.prod(axis=1), taken[:, 1])[image]

    file = image * row_bytes  # where a run's file begins in memory
    before = np.cumsum(count) - count  # tiles of earlier runs
    number = np.repeat(first - before, count) + np.arange(count.sum())  # of each tile in its image
    end = _numbers_at(encoded, np.repeat(file + _PLACES + 4, count) + 4 * number, ">u4")
    begin = np.roll(end, 1)  # where the one before it ends, but for the first of a run
    begin[before] = _numbers_at(encoded, file + _PLACES + 4 * first, ">u4")
    if (begin[before] < cuts.header[image, 1]).any() or (begin + 2 > end).any() or (end > row_bytes).any():
        return None
    marker = _RST0 + number % 8
    last = np.cumsum(taken.prod(axis=1)) - 1  # the last tile taken of each image
    marker[last] = np.where((cuts.stop == cuts.grid).all(axis=1), _EOI, marker[last])
    if (_numbers_at(encoded, np.repeat(file - 2, count) + end, ">u2") != marker).any():
        return None
    return _Tiles(image, count, begin, end)


def _smaller(encoded: np.ndarray, cuts: _Cuts, tiles: _Tiles) -> np.ndarray:
    """The cut JPEGs: uint8 [n, W']."""
    images = np.arange(len(encoded))
    file = images * encoded.shape[1]
    last_of_run = np.cumsum(tiles.count) - 1
    run_begin, run_end = tiles.begin[last_of_run + 1 - tiles.count], tiles.end[last_of_run]
    header_bytes = 2 + cuts.header[:, 1] - cuts.header[:, 0]  # SOI, and what follows the tiles' places
    file_bytes = header_bytes + np.bincount(tiles.image, run_end - run_begin).astype(np.int64)
    smaller = _joined(
        encoded,
        (images, file, file + 2),
        (images, file + cuts.header[:, 0], file + cuts.header[:, 1]),
        (tiles.image, file[tiles.image] + run_begin, file[tiles.image] + run_end),
        (images, np.full_like(images, _ZEROS), file_bytes.max() - file_bytes + _ZEROS),
    )

    size = np.minimum(cuts.stop * cuts.tile, cuts.size) - cuts.first * cuts.tile
    frame = 2 + cuts.frame - cuts.header[:, 0]
    smaller[images[:, None], frame[:, None] + np.arange(4)] = size.astype(">u2").view(np.uint8)

    count = (cuts.stop - cuts.first).prod(axis=1)  # tiles of each image
    behind = np.cumsum(tiles.end - tiles.begin)  # the bytes of this tile and of all before it, of other images too
    last = np.cumsum(count) - 1
    of_others = np.append(0, behind[last[:-1]])
    marker = _RST0 + (np.arange(count.sum()) - np.repeat(last + 1 - count, count)) % 8
    marker[last] = _EOI
    second_byte = np.repeat(images * smaller.shape[1] + header_bytes - of_others - 1, count) + behind
    smaller.reshape(-1)[second_byte] = marker & 0xFF
    return smaller


def _numbers_at(encoded: np.ndarray, places: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that begin at these bytes of the memory: int64."""
    numbers = np.ndarray((encoded.size - np.dtype(dtype).itemsize + 1,), dtype, encoded, strides=(1,))
    return numbers[places].astype(np.int64)


def _joined(encoded: np.ndarray, *pieces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Pieces of the memory, put together anew: uint8 [n, W'].

    pieces: to which image each goes, where it begins and ends. An image has its pieces of the first triple first. One that
    begins at _ZEROS has so many zeros.
    """
    image, begin, end = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    order = np.argsort(image, kind="stable")
    memory, zeros = encoded.reshape(-1).data, memoryview(bytes(encoded.shape[1]))
    places = zip(begin[order].tolist(), end[order].tolist(), strict=True)
    slices = [memory[b:e] if b != _ZEROS else zeros[: e - b] for b, e in places]
    return np.frombuffer(bytearray().join(slices), dtype=np.uint8).reshape(len(encoded), -1)


def _parts(jpeg: bytes) -> tuple[int, int]:
    """Where the frame header has the height, and where the scan's bits begin."""
    place = 2
    while True:
        marker, end = jpeg[place + 1], place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if marker == 0xC0:  # SOF0: length, bits a sample, height, width
            frame = place + 5
        elif marker == 0xDA:  # SOS
            return frame, end
        place = end
