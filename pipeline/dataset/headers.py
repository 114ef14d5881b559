"""What an image file's header says, and whether the file is decoded to the right pixels, without decoding it."""

import operator
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from common.files import is_storage_trouble

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP")
"""What DALI's decoders read (each tried against PIL, bit by bit, whole and damaged); PIL's names of the formats. Not JPEG 2000:
two damaged images in a batch end the process by SIGSEGV."""

MAX_PIXELS = 178_956_970
"""A header can say anything, in a file of any size. This is where PIL sees an attack: 0.5 GB in each decoding thread."""

# fmt: off
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".jps", ".png", ".apng", ".bmp", ".dib",
    ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".pam", ".jp2", ".j2k", ".j2c", ".jpc",
    ".jpf", ".jpx", ".jpm", ".jph", ".jxl", ".jxr", ".wdp", ".hdp", ".jng", ".mng", ".avif", ".avifs", ".heic", ".heif",
    ".heics", ".heifs", ".hif", ".ico", ".cur", ".tga", ".psd", ".pcx", ".sgi", ".qoi", ".exr", ".hdr", ".dds", ".icns",
    ".svg", ".xbm", ".xpm", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf",
    ".pef", ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw", ".dcm", ".fits", ".fts", ".bpg", ".flif",
)
# fmt: on
"""What files are called that say by their names that they are images, decoded here or not."""

# fmt: off
_FIRST_BYTES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8",
    b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",  # TIFF, raw photographs among them
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a",  # JPEG 2000 and XL
    b"II\xbc\x01", b"8BPS", b"qoif", b"\x76\x2f\x31\x01", b"#?RADIANCE", b"DDS ", b"icns",
    b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"IIRS",  # other raw photographs
    b"SIMPLE  =", b"BPG\xfb", b"FLIF", b"\x8aMNG\r\n\x1a\n", b"\x8bJNG\r\n\x1a\n",
)
# fmt: on
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"crx ")
"""Of the kinds of ISO's media files that hold images: AVIF, HEIC, Canon's raw photographs."""
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
"""Their lengths in bytes, which tell them from texts that begin with "BM"."""

# What comes out right, in the decoders' own terms. Everything else is left out, though DALI decodes some of it, to other
# pixels: tests/support/bad_files.py has a file of each kind, and what the pixels should be.
_JPEG_PROCESSES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, by their markers
_OTHER_JPEG_PROCESSES = {
    **dict.fromkeys((0xC3, 0xCB), "lossless compression"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical compression"),
    **dict.fromkeys((0xC9, 0xCA), "arithmetic coding"),
}
_ODD_JPEG_PROCESS = re.compile(b"\xff[" + bytes(_OTHER_JPEG_PROCESSES) + b"]")
# None, fax (2–4), LZW, JPEG, deflate, PackBits, deflate, zstd.
_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}
_TIFF_KINDS = {  # photometric interpretation, samples, bits of each
    *((0, 1, bits) for bits in (1, 8)),  # grey, 0 is white
    *((1, 1, bits) for bits in (1, 8, 12, 16)),  # grey, 0 is black
    *((2, samples, 8) for samples in (3, 4, 5, 6)),  # RGB, with alpha and more
    *((2, samples, 16) for samples in (3, 4)),
    *((3, 1, bits) for bits in (1, 2, 4, 8)),  # a palette
    *((5, 4, 8), (6, 3, 8)),  # CMYK, YCbCr
}
_BMP_BITS = {0: {1, 4, 8, 24, 32}, 1: {8}, 3: {32}}  # by the compression: none, run lengths of 8 bits, bit fields
_BMP_MASKS = {(0xFF0000, 0xFF00, 0xFF), (0xFF, 0xFF00, 0xFF0000)}  # of bit fields: R, G, B

_START_OF_SCAN = 0xDA
_SEGMENT = struct.Struct(">BBH").unpack_from
_JPEG_BLOCK = 2048  # bytes read at a time
_PPM_HEADER = 4096  # bytes that are read of it


class Header(NamedTuple):
    """What a file's header says; reason is empty for an image that can be used."""

    height: int = 0
    width: int = 0
    bytes: int = 0
    format: str = ""
    """One of FORMATS."""
    reason: str = ""
    storage_failed: bool = False
    """Whether the reason is a trouble of the storage, which may pass, and says nothing about the image."""


def read_header(path: Path) -> Header:
    """Read an image's size from its header, judge its kind, and look for its end, without decoding it."""
    from PIL import Image, UnidentifiedImageError  # here, so that opening a manifest does not pay for it

    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Header(reason="not a regular file")
        if status.st_size == 0:
            return Header(reason="empty file")
        with open(path, "rb") as file:
            is_jpeg = file.read(2) == b"\xff\xd8"
            file.seek(0)
            Image.MAX_IMAGE_PIXELS = None  # no warnings: our own limit stands below
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PIL's show lines of its source; the reason is what counts
                    with Image.open(file, formats=("JPEG",) if is_jpeg else None) as image:
                        image_format, (width, height) = image.format, image.size
                        why = _FAULTS[image_format](file, image) if image_format in _FAULTS else ""
            except UnidentifiedImageError:
                if is_jpeg:
                    why = _jpeg_frame_fault(file)
                    return Header(
                        reason=f"JPEG with {why}: not decoded here" if why else "no image header (cut or corrupt JPEG)"
                    )
                file.seek(0)
                known = _starts_as_image(file.read(32))
                return Header(reason="a kind of image that is not decoded here" if known else "not an image")
            except Exception as error:  # PIL's plugins raise all kinds on corrupt headers
                if isinstance(error, OSError) and error.errno:
                    raise
                return Header(reason=f"no image header ({error or type(error).__name__})")
            if image_format not in FORMATS:
                return Header(reason=f"{image_format}: a format that is not decoded here")
            if width < 1 or height < 1:
                return Header(reason=f"no image header ({width}x{height} pixels)")
            if width * height > MAX_PIXELS:
                return Header(reason=f"more than {MAX_PIXELS:,} pixels")
            if why:
                return Header(reason=f"{image_format} with {why}: not decoded here")
            if not _has_end(file, status.st_size, image_format):
                return Header(reason=f"no end marker (truncated {image_format})")
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        return Header(reason=reason, storage_failed=is_storage_trouble(error))
    return Header(height=height, width=width, bytes=status.st_size, format=image_format)


def says_image(path: Path) -> bool:
    """Whether a file says, by its name or its first bytes, that it is an image, which all that can be used do."""
    if path.name.lower().endswith(IMAGE_EXTENSIONS):
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return _starts_as_image(file.read(32))
    except OSError:
        return False


def _starts_as_image(start: bytes) -> bool:
    return (
        start.startswith(_FIRST_BYTES)
        or (start[:1] == b"P" and start[1:2] in b"1234567fF" and start[2:3].isspace())
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)
        or (start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADERS)
    )


# ---- kinds of files of which the pixels do not come out right: what is unusual in them, or "" ------------------


def _jpeg_fault(file: BinaryIO, image: "Image.Image") -> str:
    if image.mode == "CMYK" and "adobe_transform" not in image.info:
        return "4 components without Adobe's marker"
    header_length = file.tell()  # where PIL stopped
    file.seek(0)
    # Segment by segment would take 8 µs: of a plain JPEG, only that there is no such marker anywhere in the header.
    may_be_odd = image.format == "MPO" or _ODD_JPEG_PROCESS.search(file.read(header_length))
    return _jpeg_frame_fault(file) if may_be_odd else ""


def _jpeg_frame_fault(file: BinaryIO) -> str:
    for marker, start, length in _jpeg_segments(file):
        if marker in _OTHER_JPEG_PROCESSES:
            return _OTHER_JPEG_PROCESSES[marker]
        if marker in _JPEG_PROCESSES and length >= 6:
            file.seek(start)
            bits, components = file.read(6)[::5]
            if bits != 8:
                return f"{bits} bits"
            if components not in (1, 3, 4):
                return f"{components} components"
    return ""


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """The header's segments up to the first scan's, which ends the header: marker, where its content starts, its length."""
    position, block, block_start = 2, b"", 0
    while True:
        inside = position - block_start
        if inside + 4 > len(block):
            file.seek(position)
            block, block_start, inside = file.read(_JPEG_BLOCK), position, 0
            if len(block) < 4:
                return
        filler, marker, length = _SEGMENT(block, inside)
        if filler != 0xFF:
            return
        if marker == 0xFF:  # a byte that fills up
            position += 1
            continue
        yield marker, position + 4, max(length - 2, 0)
        position += 2 + length
        if marker == _START_OF_SCAN:
            return


def _png_fault(file: BinaryIO, image: "Image.Image") -> str:
    position, is_animated = 8, False
    while True:
        file.seek(position)
        start = file.read(8)
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if position == 8 and kind != b"IHDR":
            return "Apple's changes, which only its own decoder reads"
        if kind in (b"IDAT", b"fcTL", b""):
            # The picture that PIL shows belongs to an animation if this is said before it. Else DALI shows another one.
            return "a picture that is not part of its animation" if is_animated and kind == b"IDAT" else ""
        is_animated |= kind == b"acTL"
        position += 12 + length


def _bmp_fault(file: BinaryIO, image: "Image.Image") -> str:
    file.seek(14)
    header = file.read(52)
    is_old = header[0] == 12
    bits = int.from_bytes(header[10:12] if is_old else header[14:16], "little")
    compression = 0 if is_old else int.from_bytes(header[16:20], "little")
    if bits not in _BMP_BITS.get(compression, ()):
        return f"{bits} bits" if compression == 0 else f"{bits} bits and compression {compression}"
    if compression == 3 and struct.unpack("<III", header[40:52]) not in _BMP_MASKS:
        return "an unusual order of colours"
    return ""


def _ppm_fault(file: BinaryIO, image: "Image.Image") -> str:
    file.seek(0)
    words = re.sub(rb"#[^\r\n]*", b" ", file.read(_PPM_HEADER)).split(None, 4)
    kind = words[0].decode("latin-1") if words else ""
    if kind == "P4":
        return ""
    if kind == "P1":
        return "digits without spaces between" if _has_digits_together(file) else ""
    if kind not in ("P2", "P3", "P5", "P6"):
        return f"the type {kind[:8]}"
    if len(words) < 4 or not words[3].isdigit():
        return "a header that is too long"
    highest = int(words[3])
    if highest in (255, 65535) or (kind in ("P2", "P3") and highest < 255):
        return ""
    return f"{highest} as its highest value"


def _has_digits_together(file: BinaryIO) -> bool:
    """Whether the values of an ASCII PBM stand together, as they may: DALI takes 10 for one value."""
    file.seek(0)
    *_, values = re.sub(rb"#[^\r\n]*", b" ", file.read()).split(None, 3)
    return re.search(rb"[01]{2}", values) is not None


def _tiff_fault(file: BinaryIO, image: "Image.Image") -> str:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, samples, photometric = set(tags.get(258, ())), tags.get(277, 1), tags.get(262)
    compression = tags.get(259, 1)
    if tags.get(254, 0) not in (0, 2) or 50706 in tags:
        return "a small copy in front of the image"  # of raw photographs
    if tags.get(274, 1) not in (0, 1):
        return f"orientation {tags[274]}, which is not applied"
    if compression not in _TIFF_COMPRESSIONS:
        return f"compression {compression}"
    if set(tags.get(339, (1,))) != {1}:
        return "numbers that are signed or floating-point"
    if tags.get(284, 1) != 1 and samples > 1:
        return "a plane for each colour"  # one that is cut or damaged would come out black, without an error
    if (photometric, samples, *bits) not in _TIFF_KINDS:
        return f"{samples} × {max(bits, default='?')} bits of photometric interpretation {photometric}"
    if compression == 7 and bits == {12}:
        return "JPEG of 12 bits"  # of an odd width, the last pixel of each row would be left to chance
    if photometric == 2 and 1 in tags.get(338, ()):
        return "colours multiplied by alpha"
    if photometric == 3 and max(tags[320]) < 256:
        return "a palette of 8 bits"
    if photometric == 5 and tags.get(332, 1) != 1:
        return "inks that are not CMYK"
    if photometric == 6 and compression != 7:
        return "YCbCr that is not JPEG"
    width, height = image.size
    if 324 in tags:  # tiles
        across, down, starts, lengths = (tags.get(tag, ()) for tag in (322, 323, 324, 325))
    else:  # strips
        across, down = width, min(height, tags.get(278, height))
        starts, lengths = tags.get(273, ()), tags.get(279, ())
    if len(starts) < -(-width // across) * -(-height // down) or len(starts) != len(lengths):
        return "a part missing"
    if max(map(operator.add, starts, lengths)) > os.fstat(file.fileno()).st_size:
        return "parts beyond its end (truncated)"
    return ""


def _webp_fault(file: BinaryIO, image: "Image.Image") -> str:
    file.seek(12)
    kind, flags = struct.unpack("<4s4xB", file.read(9))
    has_exif, is_animated = bool(flags & 0x08), bool(flags & 0x02)
    # Of a single picture with both, DALI's parser says that its stream ends too early.
    return "alpha and EXIF data" if kind == b"VP8X" and image.mode == "RGBA" and has_exif and not is_animated else ""


_FAULTS: dict[str | None, Callable[[BinaryIO, "Image.Image"], str]] = {
    "JPEG": _jpeg_fault,
    "MPO": _jpeg_fault,
    "PNG": _png_fault,
    "BMP": _bmp_fault,
    "PPM": _ppm_fault,
    "TIFF": _tiff_fault,
    "WEBP": _webp_fault,
}


# ---- the end -----------------------------------------------------------------------------------------------------


def _has_end(file: BinaryIO, size: int, image_format: str) -> bool:
    if image_format in ("JPEG", "MPO"):
        end = b"\xff\xd9"
    elif image_format == "PNG":
        end = b"IEND\xaeB`\x82"
    else:
        return True
    file.seek(max(size - len(end), 0))
    if file.read() == end:
        return True
    # Bytes after the end are harmless and not rare: look for it in the whole file; but an end marker before the first
    # scan's data belongs to a thumbnail in the header.
    start = 8
    if image_format != "PNG":
        scans = (start + length for marker, start, length in _jpeg_segments(file) if marker == _START_OF_SCAN)
        start = next(scans, size)
    file.seek(start)
    return end in file.read()
