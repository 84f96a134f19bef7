"""A scan or photograph to a page of ink: any format, either polarity, uneven paper."""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paragraph_ocr.data.normalise import normalise_page
from paragraph_ocr.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}

MAX_PIXELS = 150_000_000
"""More than a page at 1,200 dpi; larger claims are taken for decompression bombs."""

_CONTRAST = 30
"""Grey levels between ground and writing, below which a page counts as blank."""

_COARSE_PX, _BLOCK_PX = 600, 4
"""Paper is found on a copy this long, of which each block of pixels gives its brightest."""
_PAPER_BLOCKS, _PAPER_BLUR = 9, 2.5
"""Window in which the brightest is taken for paper, wider than a stroke, and its blur, in blocks."""

_FAINTEST, _FULL = 0.25, 0.85
"""How dark ink is at least, and where it is full, in strokes. What shows through from the back is fainter,
and so is smooth paper's grain."""

_GRAIN, _DARKEST_GRAIN = 3.7, 0.7
"""Median deviations from the median by which the grain of woven or coarse paper may be darker (2.5 standard
deviations of a normal distribution), and the most that is taken for grain, in strokes."""

_SPARE = 3
"""How many times as large as it will be a page is cleaned at most. Strokes are thresholded before they are
scaled: at 2 the mean pixel of a page of 300 dpi differs by 0.7 of 255 from what the whole scan gives, at 3
by 0.4."""

_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise for damaged files, each its own."""


class Page(NamedTuple):
    """An image as ink that fits a canvas."""

    ink: np.ndarray
    """uint8 (H, W): 0 is paper, 255 is ink."""
    size: tuple[int, int]
    """Height and width of the image, upright, in pixels."""
    to_image: np.ndarray
    """Map (2, 3) from (x, y, 1) on the page to the image: corners of pixels, 0 being the upper left edge."""


def read_scan(path: Path) -> np.ndarray:
    """Return the image as ink, uint8 (H, W): 0 is paper, 255 is ink.

    Light writing on a dark ground is turned round; paper is evened out.

    Raises:
        UserError: see `read_grey`.
    """
    return ink(read_grey(path, where=str(path)))


def read_page(
    file: Path | bytes | Image.Image,
    *,
    where: str,
    height: int,
    width: int,
    normalise: bool = False,
) -> Page:
    """Return the image as ink on a canvas: scaled down to fit as by `fit`, or as by `normalise_page`.

    A much larger image is scaled down first, a JPEG while it is unpacked: cleaning takes no longer for
    pixels that nobody will see.

    Raises:
        UserError: see `read_grey`.
    """
    grey, own = _read(file, where=where, canvas=(height, width))
    size = _fitted(own, height, width)
    spare = (size[0] * _SPARE, size[1] * _SPARE)
    if spare[0] < grey.shape[0] and spare[1] < grey.shape[1]:
        grey = _scaled(grey, spare)
    page, to_grey = (
        normalise_page(ink(grey), height=height, width=width)
        if normalise
        else (_scaled(ink(grey), size), _scaling(size, grey.shape))
    )
    to_image = to_grey * (np.array(own) / grey.shape)[::-1, None]
    return Page(page, own, to_image)


def read_grey(file: Path | bytes | Image.Image, *, where: str) -> np.ndarray:
    """Return the image as grey, uint8 (H, W).

    Grey, RGB, palette, CMYK and 16-bit images; transparency shows white paper; the camera's
    orientation is obeyed.

    Args:
        file: a path, the bytes of a file, or an image of Pillow's, which stays open.
        where: the path to name to a person.

    Raises:
        UserError: not an image of FORMATS, broken, or larger than MAX_PIXELS.
    """
    return _read(file, where=where)[0]


def _read(
    file: Path | bytes | Image.Image, *, where: str, canvas: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the image as grey, and its own height and width.

    Args:
        canvas: what the page will be fitted to; a JPEG may then come smaller than it is.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            _opened(file) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{where} claims {image.width}x{image.height} px, and {MAX_PIXELS:,} are the most. "
                    "Scale it down."
                )
            own = (image.height, image.width)
            if canvas is not None and image is not file:
                image.draft("L", _least(own, canvas))
            upright = ImageOps.exif_transpose(image)
            turned = upright.size != image.size
            return _grey(upright), own[::-1] if turned else own
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where} claims more than {MAX_PIXELS:,} px, which are the most. Scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is no {', '.join(FORMATS)} image. Convert it.") from error
    except UserError:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where} cannot be read: {said}. Mend it or take it out.") from error


def _least(own: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of which an image has to come to be cleaned, whichever way up it is."""
    sizes = [_fitted(own, *sides) for sides in (canvas, canvas[::-1])]
    height, width = (max(sides) * _SPARE for sides in zip(*sizes, strict=True))
    return width, height


def _opened(file: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(file, Image.Image):
        return nullcontext(file)
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def _grey(image: Image.Image) -> np.ndarray:
    """Return the image as uint8 grey."""
    if image.mode == "L" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits
        wide = np.asarray(image, dtype=np.float64)
        return np.clip(wide / max(wide.max(), 1) * 255, 0, 255).astype(np.uint8)
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return np.asarray(image.convert("RGB").convert("L"))


def ink(grey: np.ndarray) -> np.ndarray:
    """Return grey values as ink: polarity found, paper evened out to 0, full strokes at 255."""
    # writing covers less than the ground does, whichever is darker; a blank page has but grain
    low, middle, high = _percentiles(grey, 1, 50, 99)
    if high - low > _CONTRAST and middle < (low + high) / 2:
        grey = cv2.bitwise_not(grey)
    paper = cv2.resize(_paper(grey), grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    light = cv2.divide(grey, paper, scale=255)  # 255 is as bright as the paper
    dark = 1 - np.arange(256) / 255  # of each of its values
    darkest, ground = _percentiles(light, 1, 50)
    strokes = max(1 - darkest / 255, 0.15)  # a blank page has none
    (deviation,) = _percentiles(cv2.absdiff(light, np.full_like(light, round(ground))), 50)
    grain = (1 - ground / 255 + _GRAIN * deviation / 255) / strokes
    least = min(max(_FAINTEST, grain), _DARKEST_GRAIN)
    levels = np.clip((dark / strokes - least) / (_FULL - least), 0, 1) * 255
    return cv2.LUT(light, levels.astype(np.uint8))


def _paper(grey: np.ndarray) -> np.ndarray:
    """Return how bright the paper is, at least 1, on a coarse copy of the page."""
    scale = min(1.0, _COARSE_PX / max(grey.shape))
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    coarse = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
    block = np.ones((_BLOCK_PX, _BLOCK_PX), np.uint8)
    brightest = cv2.dilate(coarse, block, anchor=(0, 0))[::_BLOCK_PX, ::_BLOCK_PX]
    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_PAPER_BLOCKS, _PAPER_BLOCKS))
    closed = cv2.morphologyEx(np.ascontiguousarray(brightest), cv2.MORPH_CLOSE, window)
    return np.maximum(cv2.GaussianBlur(closed, (0, 0), _PAPER_BLUR), 1)


def _percentiles(values: np.ndarray, *percents: int) -> list[float]:
    """Return what np.percentile does, of uint8 by counting."""
    counts = cv2.calcHist([values], [0], None, [256], [0, 256]).ravel()
    up_to = np.cumsum(counts, dtype=np.int64)
    ranks = np.array(percents) / 100 * (up_to[-1] - 1)
    below, above = (np.searchsorted(up_to, whole(ranks), "right") for whole in (np.floor, np.ceil))
    return (below + (above - below) * (ranks % 1)).tolist()


def fit(page: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Return the page scaled down to fit a canvas in pixels, whole; a smaller page as it is."""
    return _scaled(page, _fitted(page.shape, height, width))


def _fitted(size: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """Return height and width of a page once it has been scaled down to fit a canvas."""
    scale = min(1.0, height / size[0], width / size[1])
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _scaled(page: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if page.shape == size:
        return page
    return cv2.resize(page, size[::-1], interpolation=cv2.INTER_AREA)


def _scaling(size: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
    """Return the map (2, 3) from (x, y, 1) on a page of a height and width to one of another."""
    return np.array([[other[1] / size[1], 0, 0], [0, other[0] / size[0], 0]])


def cut(page: np.ndarray, polygon: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the part of the page inside the polygon, on paper as large as its bounds.

    Corners (x, y) in pixels; what lies off the page is paper.
    """
    corners = np.array(polygon, np.int32)
    left, top = np.maximum(corners.min(axis=0), 0)
    right, bottom = np.minimum(corners.max(axis=0) + 1, page.shape[::-1])
    if right <= left or bottom <= top:
        return np.zeros((1, 1), np.uint8)
    inside = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillPoly(inside, [corners - (left, top)], 255)
    return np.minimum(page[top:bottom, left:right], inside)
