"""Files such as are found in data folders: good ones of unusual kinds, and bad ones of every kind. All made here."""

import io
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from tests.support.file_formats import (
    bmp,
    colour_map,
    interlaced_rows,
    jpeg,
    packed,
    pam,
    pfm,
    png,
    png_chunk,
    pnm,
    riff,
    run_lengths,
    tiff,
)
from tests.support.images import photographs


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    write: Callable[[Path], object]
    decodable: bool
    name: str = ""
    """The file's name, where it matters; else it is named after the kind."""
    pixels: np.ndarray | None = None
    """What should come out, uint8 [height, width, 3], where PIL does not say it."""


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
_RGB, _GREY = np.asarray(photo()), np.asarray(photo(mode="L"))
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


def png_16_bits() -> bytes:
    return png((110, 150), 16, 2, [row.tobytes() for row in _RGB.astype(">u2") * 257])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def rotated(orientation: int) -> bytes:
    return encoded(photo(), "JPEG", exif=exif(orientation))


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
    "png with too few rows": content(png((110, 150), 8, 2, [bytes(1000)])),
    "png with a wrong checksum": content(PNG[:-30] + b"wrong!" + PNG[-24:]),
    "webp cut": cut(encoded(photo(), "WEBP"), 0.5),
    "bmp cut": cut(encoded(photo(), "BMP"), 0.5),
    "tiff cut": cut(encoded(photo(), "TIFF"), 0.5),
    "ppm cut": cut(encoded(photo(), "PPM"), 0.5),
    "jpeg2000 cut": cut(encoded(photo(), "JPEG2000"), 0.5),
    "65500x65500 jpeg": content(jpeg_of_size(65500, 65500)),
    "0x0 jpeg": content(jpeg_of_size(0, 0)),
    "60000x60000 png": content(png((60000, 60000), 8, 2, [bytes(1000)])),
    "0x0 png": content(png((0, 0), 8, 2, [])),
    "2000000000x1 png": content(png((1, 2_000_000_000), 8, 2, [bytes(1000)])),
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


# ---- unusual kinds, which a decoder may take for others: only the scan and decoding are tried with them, not a training ----

_SIZE = _GREY.shape
_ALPHA = np.tile(np.linspace(0, 255, _SIZE[1]).astype(np.uint8), (_SIZE[0], 1))
_RGBA, _GREY_ALPHA = np.dstack((_RGB, _ALPHA)), np.dstack((_GREY, _ALPHA))
_BLACK = (_GREY < 128).astype(np.uint8)  # 1 where it is
_FEW = photo().quantize(16)
_INDICES, _PALETTE = np.asarray(_FEW), np.asarray(_FEW.getpalette("RGB"), dtype=np.uint8)[:48].reshape(16, 3)
_256 = photo(mode="P")
_INDICES_256 = np.asarray(_256)
_PALETTE_256 = np.resize(np.asarray(_256.getpalette("RGB"), dtype=np.uint8), (256, 3))
_YCC, _CMYK = np.asarray(photo(mode="YCbCr")), np.asarray(photo(mode="CMYK"))
_BGR = _RGB[..., ::-1]
_RGB_555 = ((_RGB >> 3).astype(np.uint16) @ np.array([1 << 10, 1 << 5, 1], dtype=np.uint16)).astype("<u2")
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_SUBSAMPLED = {"4:1:1": (4, 1), "4:4:0": (1, 2), "4:1:0": (4, 2), "3:1": (3, 1)}


def grey(levels: np.ndarray) -> np.ndarray:
    """[height, width] → uint8 [height, width, 3]."""
    return np.repeat(np.rint(levels)[..., None], 3, axis=2).astype(np.uint8)


def of_highest(levels: np.ndarray, highest: int) -> np.ndarray:
    """0–255 → 0–highest."""
    return np.rint(levels / 255 * highest).astype(np.int64)


def first_frame_smaller() -> bytes:
    """A WebP of which the first frame has an offset and is smaller than the picture."""
    frame = encoded(photo(60, 40), "WEBP", lossless=True)[12:]
    place = b"".join(struct.pack("<I", value)[:3] for value in (10, 5, 59, 39, 100))
    whole = b"\x02\0\0\0" + b"".join(struct.pack("<I", side - 1)[:3] for side in (150, 110))
    return riff((b"VP8X", whole), (b"ANIM", b"\xff" * 4 + b"\0\0"), *[(b"ANMF", place + b"\0" + frame)] * 2)


def good(data: bytes, pixels: np.ndarray | None = None) -> Kind:
    return Kind(content(data), decodable=True, pixels=pixels)


def bad(data: bytes) -> Kind:
    return Kind(content(data), decodable=False)


_WITH_TIFF_COMPRESSION = {
    f"tiff {mode} {compression}": good(encoded(photo(mode=mode), "TIFF", compression=compression))
    for mode, compressions in {
        "1": ("group3", "group4", "packbits"),
        "L": ("tiff_lzw", "jpeg", "zstd"),
        "RGB": ("tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg", "zstd"),
        "CMYK": ("tiff_lzw", "jpeg"),
        "YCbCr": ("jpeg",),
    }.items()
    for compression in compressions
}
_JPEGS_BY_ADOBE = {
    f"jpeg of 4 components, transform {transform}": good(jpeg(_CMYK, [(1, 1)] * 4, adobe=transform))
    for transform in (0, 2)
} | {
    f"jpeg of components {name}": good(jpeg(_YCC, [(1, 1)] * 3, ids=ids, adobe=transform))
    for name, ids, transform in (
        ("R, G, B", b"RGB", None),
        ("0, 1, 2", (0, 1, 2), None),
        ("1, 2, 3 untransformed", (1, 2, 3), 0),
    )
}

UNUSUAL = {
    "pbm": good(pnm("P4", _BLACK)),
    "pbm ascii": good(pnm("P1", _BLACK)),
    "pgm ascii up to 100": good(pnm("P2", of_highest(_GREY, 100), 100)),
    "ppm ascii": good(pnm("P3", _RGB)),
    "pgm up to 65535": good(pnm("P5", of_highest(_GREY, 65535), 65535), grey(_GREY)),
    "ppm up to 65535": good(pnm("P6", of_highest(_RGB, 65535), 65535)),
    "pgm with comments": good(pnm("P5", _GREY, comment="# 100\n#\n")),
    "tiff where 0 is white": good(tiff(255 - _GREY, 0)),
    "tiff of 1 bit": good(tiff(packed(1 - _BLACK, 1), 1, 1, size=_SIZE)),
    "tiff of 1 bit where 0 is white": good(tiff(packed(_BLACK, 1), 0, 1, size=_SIZE)),
    "tiff of 12 bits": good(tiff(packed(of_highest(_GREY, 4095), 12), 1, 12, size=_SIZE), grey(_GREY)),
    "tiff of 16 bits": good(tiff(_GREY.astype("<u2") * 257, 1, 16), grey(_GREY)),
    "tiff rgb of 16 bits, big-endian": good(tiff(_RGB.astype(">u2") * 257, 2, 16, big_endian=True)),
    "tiff rgb, big-endian": good(tiff(_RGB, 2, big_endian=True)),
    "bigtiff": good(tiff(_RGB, 2, bigtiff=True)),
    "tiff with alpha": good(tiff(_RGBA, 2, t338=(3, [2]))),
    "tiff with a sample more": good(tiff(_RGBA, 2, t338=(3, [0]))),
    "tiff of 5 samples": good(tiff(np.dstack((_RGBA, _ALPHA)), 2, t338=(3, [0, 0]))),
    "tiff palette": good(tiff(_INDICES_256, 3, t320=colour_map(_PALETTE_256))),
    "tiff palette of 4 bits": good(
        tiff(packed(_INDICES, 4), 3, 4, size=_SIZE, t320=colour_map(_PALETTE)), _PALETTE[_INDICES]
    ),
    "tiff cmyk": good(tiff(_CMYK, 5)),
    "tiff tiles": good(tiff(_RGB, 2, tile=64)),
    "tiff tiles of 16 bits": good(tiff(_GREY.astype("<u2") * 257, 1, 16, tile=64), grey(_GREY)),
    "tiff with differences": good(encoded(photo(), "TIFF", compression="tiff_lzw", tiffinfo={317: 2})),
    **_WITH_TIFF_COMPRESSION,
    "png of 2 bits": good(png(_SIZE, 2, 0, [row.tobytes() for row in packed(of_highest(_GREY, 3), 2)])),
    "png palette of 4 bits": good(
        png(_SIZE, 4, 3, [row.tobytes() for row in packed(_INDICES, 4)], png_chunk(b"PLTE", _PALETTE.tobytes()))
    ),
    "png with a transparent grey": good(
        png(_SIZE, 8, 0, [row.tobytes() for row in _GREY], png_chunk(b"tRNS", bytes((0, int(_GREY[5, 5])))))
    ),
    "png with a transparent colour": good(
        png(_SIZE, 8, 2, [row.tobytes() for row in _RGB], png_chunk(b"tRNS", _RGB[5, 5].astype(">u2").tobytes()))
    ),
    "png with alpha of 16 bits": good(png(_SIZE, 16, 6, [row.tobytes() for row in _RGBA.astype(">u2") * 257])),
    "png grey with alpha of 16 bits": good(
        png(_SIZE, 16, 4, [row.tobytes() for row in _GREY_ALPHA.astype(">u2") * 257])
    ),
    "png interlaced": good(png(_SIZE, 8, 2, interlaced_rows(_RGB), interlaced=True)),
    "png linear": good(
        png(_SIZE, 8, 2, [row.tobytes() for row in _RGB], png_chunk(b"gAMA", struct.pack(">I", 100_000)))
    ),
    "png with a profile": good(encoded(photo(), "PNG", icc_profile=_SRGB)),
    "png with an orientation": good(encoded(photo(), "PNG", exif=exif(6))),
    "bmp top down": good(bmp(_BGR, 24, _SIZE, top_down=True)),
    "bmp of OS/2": good(bmp(_BGR, 24, _SIZE, header=12)),
    "bmp of 1 bit": good(bmp(packed(_BLACK, 1), 1, _SIZE, palette=_PALETTE[:2])),
    "bmp of 4 bits": good(bmp(packed(_INDICES, 4), 4, _SIZE, palette=_PALETTE)),
    "bmp of 32 bits": good(bmp(np.dstack((_BGR, _ALPHA)), 32, _SIZE)),
    "bmp with alpha": good(
        bmp(np.dstack((_BGR, _ALPHA)), 32, _SIZE, compression=3, header=124, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000))
    ),
    "bmp of run lengths": good(
        bmp(_INDICES_256, 8, _SIZE, compression=1, palette=_PALETTE_256, data=run_lengths(_INDICES_256))
    ),
    "webp with an orientation": good(encoded(photo(), "WEBP", exif=exif(6))),
    "webp whose first frame is smaller": good(first_frame_smaller()),
    "webp with alpha and a profile": good(encoded(Image.fromarray(_RGBA), "WEBP", icc_profile=_SRGB)),
    **{
        f"jpeg {name}{' apart' * (not interleaved)}": good(
            jpeg(_YCC, [sampling, (1, 1), (1, 1)], interleaved=interleaved)
        )
        for name, sampling in _SUBSAMPLED.items()
        for interleaved in (True, False)
    },
    "jpeg with more red than blue": good(jpeg(_YCC, [(2, 2), (2, 1), (1, 2)])),
    "jpeg grey of 2×2 blocks": good(jpeg(_YCC[..., :1], [(2, 2)])),
    "jpeg extended": good(jpeg(_YCC, [(1, 1)] * 3, process=0xC1)),
    "jpeg with bytes that fill up": good(JPEG[:2] + b"\xff\xff" + JPEG[2:]),
    **_JPEGS_BY_ADOBE,
}
"""Unusual kinds that come out right."""

MISREAD = {
    **{
        f"{kind} up to {highest}": bad(pnm(number, of_highest(levels, highest), highest))
        for kind, number, levels in (("pgm", "P5", _GREY), ("ppm", "P6", _RGB))
        for highest in (1, 100, 254, 256, 1023)
    },
    **{
        f"{kind} ascii up to 1023": bad(pnm(number, of_highest(levels, 1023), 1023))
        for kind, number, levels in (("pgm", "P2", _GREY), ("ppm", "P3", _RGB))
    },
    "pbm ascii without spaces": bad(b"P1 150 110\n" + b"\n".join(map(bytes, _BLACK + ord("0")))),
    "pfm": bad(pfm(_RGB / 255)),
    "pam": bad(pam(_RGBA, "RGB_ALPHA")),
    "tiff grey with alpha": bad(tiff(_GREY_ALPHA, 1, t338=(3, [2]))),
    "tiff grey with a sample more": bad(tiff(_GREY_ALPHA, 1, t338=(3, [0]))),
    "tiff palette with alpha": bad(
        tiff(np.dstack((_INDICES_256, _ALPHA)), 3, t338=(3, [2]), t320=colour_map(_PALETTE_256))
    ),
    "tiff palette of 8 bits a colour": bad(tiff(_INDICES_256, 3, t320=colour_map(_PALETTE_256, 1))),
    "tiff multiplied by alpha": bad(
        tiff(np.dstack(((_RGB * (_ALPHA[..., None] / 255)).astype(np.uint8), _ALPHA)), 2, t338=(3, [1]))
    ),
    "tiff of planes": bad(tiff(_RGB, 2, planes_apart=True)),
    "tiff of planes with alpha": bad(tiff(_RGBA, 2, planes_apart=True, t338=(3, [2]))),
    "tiff of planes of 16 bits": bad(tiff(_RGB.astype("<u2") * 257, 2, 16, planes_apart=True)),
    "tiff of 16 bits where 0 is white": bad(tiff(65535 - _GREY.astype("<u2") * 257, 0, 16)),
    "tiff of 16 bits, signed": bad(tiff(_GREY.astype("<i2") * 128, 1, 16, t339=(3, [2]))),
    "tiff of 32 bits": bad(tiff(_GREY.astype("<u4") * 0x1010101, 1, 32)),
    "tiff of 4 bits": bad(tiff(packed(of_highest(_GREY, 15), 4), 1, 4, size=_SIZE)),
    **{
        f"tiff of {8 * np.dtype(dtype).itemsize} bits floating up to {highest}": bad(
            tiff((_GREY / 255 * highest).astype(dtype), 1, 8 * np.dtype(dtype).itemsize, t339=(3, [3]))
        )
        for dtype in ("<f2", "<f4", "<f8")
        for highest in (1, 255)
    },
    "tiff rgb floating": bad(tiff((_RGB / 255).astype("<f4"), 2, 32, t339=(3, [3, 3, 3]))),
    "tiff cmyk of 16 bits": bad(tiff(_CMYK.astype("<u2") * 257, 5, 16)),
    "tiff cmyk with alpha": bad(tiff(np.dstack((_CMYK, _ALPHA)), 5, t338=(3, [0]))),
    "tiff lab": bad(tiff(_YCC, 8)),
    "tiff of 12 bits by JPEG": bad(
        tiff(
            np.frombuffer(jpeg(_YCC[..., :1], [(1, 1)], process=0xC1, bits=12), dtype=np.uint8),
            *(1, 12),
            size=_SIZE,
            t259=(3, [7]),
        )
    ),
    "tiff with a strip missing": bad(tiff(_RGB, 2, t278=(4, [55]))),
    "tiff with a tile missing": bad(tiff(_RGB, 2, tile=64, t257=(4, [2 * _SIZE[0]]))),
    "tiff lzma": bad(encoded(photo(), "TIFF", compression="lzma")),
    "tiff of 1 bit by PIL": bad(encoded(photo(mode="1"), "TIFF")),
    "tiff with a thumbnail in front": bad(tiff(_RGB, 2, t254=(4, [1]))),
    "dng": bad(tiff(_RGB, 2, t50706=(1, [1, 4, 0, 0]))),
    **{
        f"tiff with orientation {orientation}": bad(tiff(_RGB, 2, t274=(3, [orientation])))
        for orientation in range(2, 9)
    },
    "png whose picture is not in its animation": bad(
        encoded(photo(), "PNG", save_all=True, default_image=True, append_images=[photo(mode="L").convert("RGB")] * 2)
    ),
    "png of Apple's": bad(PNG[:8] + png_chunk(b"CgBI", b"\x50\0\x20\x02") + PNG[8:]),
    **{
        f"webp{' lossless' * lossless} with alpha and an orientation": bad(
            encoded(Image.fromarray(_RGBA), "WEBP", exif=exif(6), lossless=lossless)
        )
        for lossless in (False, True)
    },
    "bmp of 16 bits": bad(bmp(_RGB_555, 16, _SIZE)),
    "bmp of 16 bits in fields": bad(
        bmp(_RGB_555, 16, _SIZE, compression=3, header=108, masks=(0x7C00, 0x3E0, 0x1F, 0))
    ),
    "bmp of fields in another order": bad(
        bmp(np.dstack((_ALPHA, _BGR)), 32, _SIZE, compression=3, header=56, masks=(0xFF000000, 0xFF0000, 0xFF00, 0))
    ),
    "bmp of run lengths of 4 bits": bad(bmp(_INDICES, 4, _SIZE, compression=2, palette=_PALETTE, data=b"\x04\x11\0\1")),
    "jpeg2000": bad(encoded(photo(), "JPEG2000")),
    "jpeg2000 stream": bad(encoded(photo(), "JPEG2000", no_jp2=True)),
    "jpeg cmyk without Adobe's marker": bad(jpeg(_CMYK, [(1, 1)] * 4)),
    "jpeg of 2 components": bad(jpeg(_YCC[..., :2], [(1, 1)] * 2)),
    "jpeg of 5 components": bad(jpeg(np.dstack((_CMYK, _ALPHA)), [(1, 1)] * 5)),
    "jpeg of 12 bits": bad(jpeg(_YCC, [(1, 1)] * 3, process=0xC1, bits=12)),
    "jpeg lossless": bad(jpeg(_YCC, [(1, 1)] * 3, process=0xC3)),
    "jpeg hierarchical": bad(jpeg(_YCC, [(1, 1)] * 3, process=0xC5)),
    "jpeg with arithmetic coding": bad(jpeg(_YCC, [(1, 1)] * 3, process=0xC9)),
}
"""Kinds with good pixels, of which DALI makes other ones, or none: the scan must leave them out by their headers."""

ODD_KINDS = UNUSUAL | MISREAD


def file_name(kind: str) -> str:
    return (KINDS | ODD_KINDS)[kind].name or f"{kind}.JPEG".replace("/", "_")
