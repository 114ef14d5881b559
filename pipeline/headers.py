"""What an image file's header says, and whether the file can be decoded at all, without decoding it."""

import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
"""What DALI's decoders read (each tried against PIL, bit by bit); PIL's names of the formats."""

MAX_PIXELS = 178_956_970
"""A header can say anything, in a file of any size. This is where PIL sees an attack: 0.5 GB in each decoding thread."""


class Header(NamedTuple):
    """What a file's header says; reason is empty for an image that can be used."""

    height: int = 0
    width: int = 0
    bytes: int = 0
    format: str = ""
    """One of FORMATS."""
    reason: str = ""


def read_header(path: Path) -> Header:
    """Read an image's size from its header and look for its end, without decoding it."""
    from PIL import Image, UnidentifiedImageError  # here, so that opening a manifest does not pay for it

    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Header(reason="not a regular file")
        if status.st_size == 0:
            return Header(reason="empty file")
        with open(path, "rb") as file:
            first_bytes = file.read(12)
            file.seek(0)
            Image.MAX_IMAGE_PIXELS = None  # no warnings: our own limit stands below
            try:
                with Image.open(file) as image:
                    image_format, (width, height) = image.format, image.size
            except UnidentifiedImageError:
                is_jpeg = first_bytes.startswith(b"\xff\xd8")
                return Header(reason="no image header (cut or corrupt JPEG)" if is_jpeg else "not an image")
            except Exception as error:  # PIL's plugins raise all kinds on corrupt headers
                return Header(reason=f"no image header ({error})")
            if image_format not in FORMATS:
                return Header(reason=f"{image_format}: a format that is not decoded here")
            if width < 1 or height < 1:
                return Header(reason=f"no image header ({width}x{height} pixels)")
            if width * height > MAX_PIXELS:
                return Header(reason=f"more than {MAX_PIXELS:,} pixels")
            if not _has_end(file, status.st_size, image_format):
                return Header(reason=f"no end marker (truncated {image_format})")
    except OSError as error:
        return Header(reason=f"cannot be read: {error.strerror or error}")
    return Header(height=height, width=width, bytes=status.st_size, format=image_format)


def _has_end(file: BinaryIO, size: int, image_format: str) -> bool:
    if image_format in ("JPEG", "MPO"):
        end, body_start = b"\xff\xd9", _jpeg_scan_offset
    elif image_format == "PNG":
        end, body_start = b"IEND\xaeB`\x82", lambda content: 8
    else:
        return True
    file.seek(max(size - len(end), 0))
    if file.read() == end:
        return True
    file.seek(0)  # bytes after the end are harmless and not rare: look for it in the whole file
    content = file.read()
    return content.find(end, body_start(content)) >= 0


def _jpeg_scan_offset(content: bytes) -> int:
    """Where the first scan's data starts: an end marker before that belongs to a thumbnail in the header."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker, length = content[position + 1], struct.unpack(">H", content[position + 2 : position + 4])[0]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + length
        if marker == 0xDA:
            return position
    return len(content)
