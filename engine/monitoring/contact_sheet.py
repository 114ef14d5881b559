"""A contact sheet: samples side by side, each as its whole source with the crop's window drawn into it, and as the crop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEAST_SIDE = 192  # pixels of a crop on the sheet; smaller ones are enlarged by a whole factor
_GAP, _LINE, _HEADING = 12, 16, 30
_BLACK, _GREY, _PAPER, _WINDOW = "#000000", "#767676", "#E9E9E9", "#E69F00"
_WIDER_THAN_HIGH = 1.4  # about, of the sheet


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One sample."""

    source: np.ndarray | None
    """uint8 [height, width, 3]: the whole image, of any size; None where it cannot be decoded."""
    window: tuple[float, float, float, float]
    """Top, left, bottom and right of the crop in that image, as shares of its height and width (0–1)."""
    crop: np.ndarray
    """uint8 [crop, crop, 3]: what the network sees."""
    caption: Sequence[str]
    """Lines; each is cut where the tile ends."""


def draw_sheet(sections: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """The sheet of sections, each with its heading; all crops have one size, all captions the same number of lines."""
    tiles = [tile for _, section in sections for tile in section]
    side = tiles[0].crop.shape[0] * _zoom(tiles[0].crop, _LEAST_SIDE)
    tile_width = 2 * side + _GAP // 2
    tile_height = side + _LINE * len(tiles[0].caption) + 4
    most = max(len(section) for _, section in sections)
    columns = min(most, math.ceil(math.sqrt(len(tiles) * _WIDER_THAN_HIGH * tile_height / tile_width)))
    heights = [_HEADING + -(-len(section) // columns) * (tile_height + _GAP) for _, section in sections]
    sheet = Image.new("RGB", (columns * (tile_width + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (heading, section), height in zip(sections, heights, strict=True):
        draw.text((_GAP, top + 8), _fitting(heading, sheet.width - 2 * _GAP, _font(15)), _BLACK, _font(15))
        for index, tile in enumerate(section):
            x = _GAP + index % columns * (tile_width + _GAP)
            y = top + _HEADING + index // columns * (tile_height + _GAP)
            _paste_source(sheet, tile, x, y, side)
            sheet.paste(_enlarged(tile.crop, side), (x + side + _GAP // 2, y))
            for number, line in enumerate(tile.caption):
                draw.text((x, y + side + 4 + number * _LINE), _fitting(line, tile_width, _font(12)), _BLACK, _font(12))
        top += height
    return sheet


def thumbnail_size(height: int, width: int, crop: int) -> tuple[int, int]:
    """The size in pixels to which a source is best reduced for the sheet; its own where it is small enough."""
    side = max(crop, _LEAST_SIDE)
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _paste_source(sheet: Image.Image, tile: Tile, x: int, y: int, side: int) -> None:
    draw = ImageDraw.Draw(sheet)
    if tile.source is None:
        draw.text((x + 8, y + 8), "cannot be decoded whole", _GREY, _font(12))
        return
    picture = _enlarged(tile.source, side)
    x, y = x + (side - picture.width) // 2, y + (side - picture.height) // 2
    sheet.paste(picture, (x, y))
    top, left, bottom, right = tile.window
    corners = (left * picture.width, top * picture.height, right * picture.width - 1, bottom * picture.height - 1)
    draw.rectangle([round(c) + o for c, o in zip(corners, (x, y, x, y), strict=True)], outline=_WINDOW, width=2)


def _zoom(picture: np.ndarray, side: int) -> int:
    return max(1, side // max(picture.shape[:2]))


def _enlarged(picture: np.ndarray, side: int) -> Image.Image:
    """By the largest whole factor that fits, so that each pixel stays one."""
    zoom = _zoom(picture, side)
    return Image.fromarray(picture.repeat(zoom, axis=0).repeat(zoom, axis=1))


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's, which is there wherever this is; Pillow's own knows few letters.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
