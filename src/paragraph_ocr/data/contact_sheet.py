"""A sheet of paragraphs for a person to look at: dark ink on white, the transcription below each."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP_PX = 12
_TEXT_PX = 14


def contact_sheet(
    images: Sequence[np.ndarray], texts: Sequence[str], *, columns: int
) -> Image.Image:
    """Return the images (uint8 (H, W), 255 is ink) row by row, each above its text.

    Raises:
        ValueError: there are no images, or not as many texts, or no columns.
    """
    if not images or len(images) != len(texts) or columns < 1:
        raise ValueError(f"{len(images)} images, {len(texts)} texts, {columns} columns")
    tiles = [_tile(image, text) for image, text in zip(images, texts, strict=True)]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = max(tile.width for tile in tiles) + _GAP_PX
    heights = [max(tile.height for tile in row) + _GAP_PX for row in rows]
    sheet = Image.new("L", (width * len(rows[0]) + _GAP_PX, sum(heights) + _GAP_PX), 255)
    top = _GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP_PX + column * width, top))
        top += height
    return sheet


def _tile(image: np.ndarray, text: str) -> Image.Image:
    font = ImageFont.load_default(_TEXT_PX)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = map(int, measure.multiline_textbbox((0, 0), text or " ", font=font))
    height, width = image.shape
    tile = Image.new("L", (max(width, right) + 2, height + bottom + 10), 255)
    tile.paste(Image.fromarray(255 - image), (1, 1))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, width + 1, height + 1), outline=170)
    draw.multiline_text((1, height + 5), text, font=font, fill=60)
    return tile
