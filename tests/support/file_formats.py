"""Image files written by hand, of kinds that PIL cannot write: each function makes the bytes of a file."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

_TIFF_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 16: "Q"}


def pnm(kind: str, levels: np.ndarray, highest: int = 255, comment: str = "") -> bytes:
    """kind: P1 to P6. levels: [height, width] or [height, width, 3], from 0 to `highest`; for P1 and P4, 1 is black."""
    height, width = levels.shape[:2]
    header = f"{kind}\n{comment}{width} {height}\n" + ("" if kind in ("P1", "P4") else f"{highest}\n")
    if kind in ("P1", "P2", "P3"):
        body = "".join(" ".join(map(str, row.ravel())) + "\n" for row in levels).encode()
    elif kind == "P4":
        body = np.packbits(levels.astype(np.uint8), axis=1).tobytes()
    else:
        body = levels.astype(">u2" if highest > 255 else "u1").tobytes()
    return header.encode() + body


def pam(pixels: np.ndarray, kind: str) -> bytes:
    """pixels: uint8 [height, width, depth]. kind: RGB, RGB_ALPHA …"""
    height, width, depth = pixels.shape
    header = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL 255\nTUPLTYPE {kind}\nENDHDR\n"
    return header.encode() + pixels.tobytes()


def pfm(levels: np.ndarray) -> bytes:
    """levels: [height, width, 3]."""
    height, width = levels.shape[:2]
    return f"PF\n{width} {height}\n-1.0\n".encode() + levels[::-1].astype("<f4").tobytes()


def packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """Integers of so many bits, one behind the other, each row filled up to whole bytes: uint8 [height, …]."""
    rows = levels.reshape(len(levels), -1).astype(np.int64)
    each = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.reshape(len(levels), -1).astype(np.uint8), axis=1)


def tiff(
    samples: np.ndarray,
    photometric: int,
    bits: int = 8,
    *,
    size: tuple[int, int] | None = None,
    count: int | None = None,
    big_endian: bool = False,
    bigtiff: bool = False,
    planes_apart: bool = False,
    tile: int = 0,
    **more: tuple[int, Sequence[int]],
) -> bytes:
    """An uncompressed TIFF. samples: [height, width] or [height, width, samples], or packed bits with the image's size (height,
    width) and count of samples. tile: the tiles' side, a multiple of 16; 0: one strip. more: tags by number (t338=…), as (type,
    values).
    """
    height, width = size or samples.shape[:2]
    count = count or (samples.shape[2] if samples.ndim == 3 else 1)
    planes = [samples[..., plane] for plane in range(count)] if planes_apart else [samples]
    if tile:
        padding = [(0, -height % tile), (0, -width % tile)]
        planes = [np.pad(plane, padding + [(0, 0)] * (plane.ndim - 2)) for plane in planes]
        corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
        blobs = [plane[y : y + tile, x : x + tile].tobytes() for plane in planes for y, x in corners]
    else:
        blobs = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    order, offset_type, inline = ">" if big_endian else "<", 16 if bigtiff else 4, 8 if bigtiff else 4
    start = (b"MM" if big_endian else b"II") + (
        struct.pack(order + "HHHQ", 43, 8, 0, 16) if bigtiff else struct.pack(order + "HI", 42, 8)
    )
    tags: dict[int, tuple[int, Sequence]] = {
        **{256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [1]), 262: (3, [photometric])},
        **{277: (3, [count]), 284: (3, [2 if planes_apart else 1])},
        **({322: (4, [tile]), 323: (4, [tile])} if tile else {278: (4, [height])}),
        (325 if tile else 279): (4, [len(blob) for blob in blobs]),
        **{int(tag[1:]): value for tag, value in more.items()},
    }

    def directory(first_blob: int) -> bytes:
        offsets = (first_blob + np.cumsum([0, *map(len, blobs[:-1])])).tolist()
        all_tags = {**tags, (324 if tile else 273): (offset_type, offsets)}
        behind = len(start) + (8 if bigtiff else 2) + len(all_tags) * (20 if bigtiff else 12) + inline
        entries, values = b"", b""
        for tag, (kind, numbers) in sorted(all_tags.items()):
            value = struct.pack(f"{order}{len(numbers)}{_TIFF_TYPES[kind]}", *numbers)
            if len(value) > inline:
                value, values = (
                    struct.pack(order + ("Q" if bigtiff else "I"), behind + len(values)),
                    values + value + bytes(len(value) % 2),
                )
            entries += struct.pack(order + ("HHQ" if bigtiff else "HHI"), tag, kind, len(numbers)) + value.ljust(
                inline, b"\0"
            )
        return struct.pack(order + ("Q" if bigtiff else "H"), len(all_tags)) + entries + bytes(inline) + values

    return start + directory(len(start) + len(directory(0))) + b"".join(blobs)


def colour_map(palette: np.ndarray, factor: int = 257) -> tuple[int, Sequence[int]]:
    """A TIFF's tag 320. palette: uint8 [colours, 3]."""
    return 3, [int(value) * factor for value in palette.T.ravel()]


def bmp(
    rows: np.ndarray,
    bits: int,
    size: tuple[int, int],
    *,
    compression: int = 0,
    palette: np.ndarray | None = None,
    masks: Sequence[int] = (),
    header: int = 40,
    top_down: bool = False,
    data: bytes = b"",
) -> bytes:
    """rows: uint8 [height, …], from the top. size: height, width. palette: uint8 [colours, 3], RGB. header: its length, 12 for
    OS/2's. data: what to write instead of the rows.
    """
    height, width = size
    rows = rows if top_down else rows[::-1]
    data = data or b"".join(row.tobytes() + bytes(-row.nbytes % 4) for row in rows)
    packed_masks = struct.pack(f"<{len(masks)}I", *masks)
    if header == 12:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        head = struct.pack(
            "<IiiHHIIiiII", header, width, -height if top_down else height, 1, bits, compression, len(data), 0, 0, 0, 0
        )
        head += packed_masks.ljust(header - 40, b"\0")
    colours = b"" if palette is None else b"".join(bytes(colour[::-1]) + bytes(header > 12) for colour in palette)
    start = 14 + len(head) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + colours + data


def run_lengths(indices: np.ndarray) -> bytes:
    """A BMP's rows of 8 bits with compression 1, each pixel a run of its own."""
    return b"".join(b"".join(bytes((1, value)) for value in row) + b"\0\0" for row in indices[::-1]) + b"\0\1"


def png(
    size: tuple[int, int], depth: int, colour: int, rows: Sequence[bytes], chunks: bytes = b"", interlaced: bool = False
) -> bytes:
    """size: height, width. rows: as the header says, or not. chunks: between header and pixels."""
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + chunks
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def interlaced_rows(levels: np.ndarray) -> list[bytes]:
    """The rows of the seven passes of an interlaced PNG."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    return [row.tobytes() for y, x, down, across in passes for row in levels[y::down, x::across]]


def jpeg(
    planes: np.ndarray,
    sampling: Sequence[tuple[int, int]],
    *,
    ids: Sequence[int] = (1, 2, 3, 4, 5),
    adobe: int | None = None,
    process: int = 0xC0,
    bits: int = 8,
    interleaved: bool = True,
) -> bytes:
    """A JPEG of blocks of one colour. planes: uint8 [height, width, components]. sampling: across and down, of each component.

    adobe: the colour transform in Adobe's marker; None: no marker. process: the frame's marker; others than 0xC0 and 0xC1 say
    what the file is not.
    """
    height, width, count = planes.shape
    most_x, most_y = (max(column) for column in zip(*sampling, strict=True))
    head = b"\xff\xd8" + (b"" if adobe is None else b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe]))
    head += b"\xff\xdb\0\x43\0" + bytes([8] * 64)
    components = b"".join(bytes((ids[n], x << 4 | y, 0)) for n, (x, y) in enumerate(sampling))
    head += struct.pack(">BBHBHHB", 0xFF, process, 8 + 3 * count, bits, height, width, count) + components
    # Codes of 4 bits for the sizes of differences.
    head += b"\xff\xc4\0\x1f\0" + bytes([0, 0, 0, 12, *[0] * 12, *range(12)])
    head += b"\xff\xc4\0\x14\x10" + bytes([1, *[0] * 15, 0])  # one code, of one bit: end of block
    levels = []
    for plane, (x, y) in enumerate(sampling):
        size = (-(-width * x // most_x // 8), -(-height * y // most_y // 8))
        levels.append(
            np.asarray(Image.fromarray(planes[..., plane]).resize(size, Image.Resampling.BOX)).astype(int) - 128
        )

    def scan(which: Sequence[int]) -> bytes:
        if len(which) == 1:
            places = [(which[0], y, x) for y, x in np.ndindex(levels[which[0]].shape)]
        else:
            units = np.ndindex(-(-height // (8 * most_y)), -(-width // (8 * most_x)))
            places = [
                (n, y * sampling[n][1] + v, x * sampling[n][0] + u)
                for y, x in units
                for n in which
                for v in range(sampling[n][1])
                for u in range(sampling[n][0])
            ]
        code, before = [], [0] * count
        for n, y, x in places:
            level = int(levels[n][min(y, len(levels[n]) - 1), min(x, levels[n].shape[1] - 1)])
            difference, before[n] = level - before[n], level
            length = abs(difference).bit_length()
            code.append(f"{length:04b}")
            if length:
                code.append(f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}")
            code.append("0")
        text = "".join(code)
        text += "1" * (-len(text) % 8)
        body = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
        named = b"".join(bytes((ids[n], 0)) for n in which)
        return b"\xff\xda" + struct.pack(">HB", 6 + 2 * len(which), len(which)) + named + b"\0\x3f\0" + body

    scans = [range(count)] if interleaved else [[n] for n in range(count)]
    return head + b"".join(map(scan, scans)) + b"\xff\xd9"


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body
