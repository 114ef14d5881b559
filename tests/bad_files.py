"""Files such as are found in data folders: good ones of unusual kinds, and bad ones of every kind. All made here."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.images import photographs


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    write: Callable[[Path], object]
    decodable: bool
    name: str = ""
    """The file's name, where it matters; else it is named after the kind."""


def photo(width: int = 150, height: int = 110, mode: str = "RGB") -> Image.Image:
    return photographs()[0].resize((width, height)).convert(mode)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


JPEG = encoded(photo(), "JPEG")
PNG = encoded(photo(), "PNG")
GIF = encoded(photo(), "GIF")
BMP = encoded(photo(), "BMP")
_NOISE = np.random.default_rng(0).bytes(20_000)
_THUMBNAIL = encoded(photo(40, 30), "JPEG")


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def cut(data: bytes, share: float) -> Callable[[Path], object]:
    """The file ends after this share of it."""
    return content(data[: int(len(data) * share)])


def jpeg_of_size(width: int, height: int) -> bytes:
    """The small JPEG, its header saying another size."""
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", height, width) + JPEG[start + 4 :]


def webp_of_size(width: int, height: int) -> bytes:
    """A small WebP, its header saying another size."""
    data = encoded(photo(), "WEBP")
    start = data.index(b"\x9d\x01\x2a") + 3
    return data[:start] + struct.pack("<HH", width, height) + data[start + 4 :]


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, pixels: bytes) -> bytes:
    """A PNG with this header (colour 0: grey, 2: RGB) and these rows, whether they fit or not."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_16_bits() -> bytes:
    values = (np.asarray(photo(), dtype=">u2") * 257).astype(">u2")
    return png(150, 110, depth=16, pixels=b"".join(b"\0" + row.tobytes() for row in values))


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def frames() -> dict:
    return {"save_all": True, "append_images": [photo(mode="L").convert("RGB")]}


def listening(path: Path) -> None:
    """A socket; it stays when nobody listens any more."""
    folder = os.open(path.parent, os.O_RDONLY)  # the address of a socket must be short: take it from within
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name(".fifo"))
    path.symlink_to(".fifo")


GOOD = {
    "plain": content(JPEG),
    "progressive": content(encoded(photo(), "JPEG", progressive=True)),
    "grey": content(encoded(photo(mode="L"), "JPEG")),
    "cmyk": content(encoded(photo(mode="CMYK"), "JPEG")),
    "rgb without a colour transform": content(encoded(photo(), "JPEG", keep_rgb=True)),
    "no chroma subsampling": content(encoded(photo(), "JPEG", subsampling=0)),
    "4:2:2": content(encoded(photo(), "JPEG", subsampling=1)),
    "restart markers": content(encoded(photo(), "JPEG", restart_marker_rows=1)),
    "quality 1": content(encoded(photo(), "JPEG", quality=1)),
    "exif mirrored": content(rotated(2)),
    "exif rotated": content(rotated(6)),
    "exif turned over": content(rotated(3)),
    "with a thumbnail": content(encoded(photo(), "JPEG", comment=_THUMBNAIL)),
    "trailing bytes": content(JPEG + _NOISE),
    "two pictures": content(encoded(photo(), "MPO", **frames())),
    "1x1": content(encoded(photo(1, 1), "JPEG")),
    "1x5000": content(encoded(photo(1, 5000), "JPEG")),
    "5000x1": content(encoded(photo(5000, 1), "JPEG")),
    "1x1 png": content(encoded(photo(1, 1), "PNG")),
    "png": content(PNG),
    "png of 16 bits": content(png_16_bits()),
    "png grey of 16 bits": content(encoded(photo(mode="L").convert("I;16").point(lambda level: level * 257), "PNG")),
    "png grey": content(encoded(photo(mode="L"), "PNG")),
    "png grey with alpha": content(encoded(photo(mode="LA"), "PNG")),
    "png with alpha": content(encoded(photo(mode="RGBA"), "PNG")),
    "png palette": content(encoded(photo(mode="P"), "PNG")),
    "png palette with transparency": content(encoded(photo(mode="P"), "PNG", transparency=3)),
    "png of 1 bit": content(encoded(photo(mode="1"), "PNG")),
    "png animated": content(encoded(photo(), "PNG", **frames())),
    "png trailing bytes": content(PNG + _NOISE),
    "webp": content(encoded(photo(), "WEBP")),
    "webp lossless": content(encoded(photo(), "WEBP", lossless=True)),
    "webp animated": content(encoded(photo(), "WEBP", **frames())),
    "webp with alpha": content(encoded(photo(mode="RGBA"), "WEBP")),
    "bmp": content(encoded(photo(), "BMP")),
    "bmp palette": content(encoded(photo(mode="P"), "BMP")),
    "tiff": content(encoded(photo(), "TIFF")),
    "tiff lzw": content(encoded(photo(), "TIFF", compression="tiff_lzw")),
    "tiff pages": content(encoded(photo(), "TIFF", **frames())),
    "ppm": content(encoded(photo(), "PPM")),
    "pgm": content(encoded(photo(mode="L"), "PPM")),
    "jpeg2000": content(encoded(photo(), "JPEG2000")),
    "jpeg2000 stream": content(encoded(photo(), "JPEG2000", no_jp2=True)),
}

BAD = {
    "empty": content(b""),
    "one byte": content(b"\xff"),
    "two bytes of a jpeg": content(b"\xff\xd8"),
    "zeros": content(bytes(5000)),
    "garbage": content(_NOISE),
    "html": content(b"<!DOCTYPE html><html><body>404 not found</body></html>"),
    "zip": content(b"PK\x03\x04" + _NOISE),
    "svg": content(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "gif": content(GIF),
    "gif animated": content(encoded(photo(), "GIF", **frames())),
    "gif cut": cut(GIF, 0.5),
    "ico": content(encoded(photo(32, 32), "ICO")),
    "header cut": content(JPEG[:100]),
    "header of zeros": content(bytes(300) + JPEG[300:]),
    "cut at a tenth": cut(JPEG, 0.1),
    "cut at a quarter": cut(JPEG, 0.25),
    "cut at half": cut(JPEG, 0.5),
    "cut at nine tenths": cut(JPEG, 0.9),
    "cut before the end marker": content(JPEG[:-2]),
    "cut in the end marker": content(JPEG[:-1]),
    "cut with a thumbnail": content(encoded(photo(), "JPEG", comment=_THUMBNAIL)[:-300]),
    "cut progressive": cut(encoded(photo(), "JPEG", progressive=True), 0.7),
    "cut and filled with zeros": content(JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2)),
    "png header cut": content(PNG[:20]),
    "png cut": cut(PNG, 0.5),
    "png without its end": content(PNG[:-12]),
    "png with too few rows": content(png(150, 110, pixels=bytes(1000))),
    "png with a wrong checksum": content(PNG[:-30] + b"wrong!" + PNG[-24:]),
    "webp cut": cut(encoded(photo(), "WEBP"), 0.5),
    "bmp cut": cut(encoded(photo(), "BMP"), 0.5),
    "tiff cut": cut(encoded(photo(), "TIFF"), 0.5),
    "ppm cut": cut(encoded(photo(), "PPM"), 0.5),
    "jpeg2000 cut": cut(encoded(photo(), "JPEG2000"), 0.5),
    "65500x65500 jpeg": content(jpeg_of_size(65500, 65500)),
    "0x0 jpeg": content(jpeg_of_size(0, 0)),
    "60000x60000 png": content(png(60000, 60000, pixels=bytes(1000))),
    "0x0 png": content(png(0, 0, pixels=b"")),
    "2000000000x1 png": content(png(2_000_000_000, 1, pixels=bytes(1000))),
    "16383x16383 webp": content(webp_of_size(16383, 16383)),
    "60000x60000 bmp": content(BMP[:18] + struct.pack("<ii", 60000, 60000) + BMP[26:]),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a folder above": lambda path: path.symlink_to(".."),
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "link to a fifo": link_to_fifo,
    "socket": listening,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "process memory": lambda path: path.symlink_to("/proc/self/mem"),
}
# Names that a file may have; a good file and a bad one of each.
NAMES = {
    "spaces": "  a b .JPEG",
    "line break": "a\nb\r.JPEG",
    "tab and backslash": "a\tb\\n.JPEG",
    "not utf-8": os.fsdecode(b"\xff\xfe\xe9.JPEG"),
    "other alphabets": "größe 猫 \u2028\u202e.JPEG",
    "255 bytes": "n" * 250 + ".JPEG",
    "like a flag": "--help.JPEG",
    "quotes and signs": "%s{}$HOME'\"`;*?.JPEG",
    "capitals": "IMAGE.JPG",
    "another extension": "image.png",
    "no extension": "image",
}

KINDS = {
    **{name: Kind(write, decodable=True) for name, write in GOOD.items()},
    **{name: Kind(write, decodable=False) for name, write in BAD.items()},
    **{f"name: {name}": Kind(content(JPEG), decodable=True, name=value) for name, value in NAMES.items()},
    **{
        f"bad, name: {name}": Kind(
            content(b""), decodable=False, name="x" + (value[1:] if len(value) == 255 else value)
        )
        for name, value in NAMES.items()
    },
}


def file_name(kind: str) -> str:
    return KINDS[kind].name or f"{kind}.JPEG".replace("/", "_")
