"""A scan or photograph to a page of ink: any format, either polarity, uneven paper."""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paragraph_ocr.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"}

MAX_PIXELS = 150_000_000
"""More than a page at 1,200 dpi; larger claims are taken for decompression bombs."""

_CONTRAST = 30
"""Grey levels between ground and writing, below which a page counts as blank."""

_PAPER_PX = 41
"""Window in which the brightest is taken for paper, on a copy of `_COARSE_PX`: wider than a stroke."""
_COARSE_PX = 600

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


def read_scan(path: Path) -> np.ndarray:
    """Return the image as ink, uint8 (H, W): 0 is paper, 255 is ink.

    Light writing on a dark ground is turned round; paper is evened out.

    Raises:
        UserError: see `read_grey`.
    """
    return ink(read_grey(path, where=str(path)))


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
            return _grey(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where} claims more than {MAX_PIXELS:,} px, which are the most. Scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is no {', '.join(FORMATS)} image. Convert it.") from error
    except _BROKEN as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read: {said}. Mend it or take it out.") from error


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
    low, middle, high = np.percentile(grey, (1, 50, 99))
    if high - low > _CONTRAST and middle < (low + high) / 2:
        grey = 255 - grey
    scale = min(1.0, _COARSE_PX / max(grey.shape))
    smaller = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    coarse = cv2.resize(grey, smaller, interpolation=cv2.INTER_AREA)
    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_PAPER_PX, _PAPER_PX))
    paper = cv2.GaussianBlur(cv2.morphologyEx(coarse, cv2.MORPH_CLOSE, window), (0, 0), 10)
    paper = cv2.resize(paper, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    dark = 1 - grey.astype(np.float32) / np.maximum(paper, 1)
    strokes = max(float(np.percentile(dark, 99)), 0.15)  # a blank page has none
    # grain of the paper and what shows through from the back is fainter than a quarter of a stroke
    return (np.clip((dark / strokes - 0.25) / 0.6, 0, 1) * 255).astype(np.uint8)


def fit(page: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Return the page scaled down to fit a canvas in pixels, whole; a smaller page as it is."""
    scale = min(height / page.shape[0], width / page.shape[1])
    if scale >= 1:
        return page
    size = (max(1, int(page.shape[1] * scale)), max(1, int(page.shape[0] * scale)))
    return cv2.resize(page, size, interpolation=cv2.INTER_AREA)


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
