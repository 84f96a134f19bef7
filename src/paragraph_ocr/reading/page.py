"""What comes before a model and after it: an image onto its canvas, and its tokens to a transcript."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from paragraph_ocr.data.scan import read_page
from paragraph_ocr.errors import UserError
from paragraph_ocr.reading.transcript import Character, Transcript, split_lines
from paragraph_ocr.vocabulary import SPECIAL_TOKENS, Vocabulary

Picture = str | Path | bytes | Image.Image | np.ndarray
"""A file or its bytes, an image of Pillow's, or an array: uint8 or uint16 (H, W), uint8 (H, W, 3) or
(H, W, 4)."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as a model sees it."""

    canvas: UInt8[np.ndarray, "H W"]
    size: tuple[int, int]
    """Height and width that the page covers of the canvas, from the top left."""
    source: str
    source_size: tuple[int, int]
    """Height and width of the image, upright."""
    to_source: np.ndarray
    """Map (2, 3) from the page to the image, as of `data.scan.Page`."""

    @property
    def page(self) -> np.ndarray:
        return self.canvas[: self.size[0], : self.size[1]]


def prepare(image: Picture, canvas: tuple[int, int], *, normalise: bool = False) -> Prepared:
    """Return the image as by datamodule=folder: ink on paper, upright, whole, and normalised if wanted.

    Raises:
        UserError: it is no image, or too large.
    """
    source = str(image) if isinstance(image, str | Path) else ""
    file = Path(image) if isinstance(image, str) else image
    if isinstance(file, np.ndarray):
        file = _from_array(file)
    height, width = canvas
    page = read_page(
        file, where=source or "the image", height=height, width=width, normalise=normalise
    )
    size = page.ink.shape
    filled = np.zeros(canvas, np.uint8)
    filled[: size[0], : size[1]] = page.ink
    return Prepared(filled, size, source, page.size, page.to_image)


def transcribe(
    tokens: Sequence[int],
    confidences: Sequence[float],
    log_probability: float,
    page: Prepared,
    vocabulary: Vocabulary,
) -> Transcript:
    """Return what was read from a page; special tokens write nothing."""
    characters = tuple(
        Character(vocabulary.tokens[token], min(1.0, confidence))
        for token, confidence in zip(tokens, confidences, strict=True)
        if token >= len(SPECIAL_TOKENS)
    )
    lines = split_lines(characters, page.page, size=page.source_size, to_image=page.to_source)
    return Transcript(page.source, page.source_size, characters, log_probability, lines)


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or colour) or 0 in array.shape:
        raise UserError(
            f"an array of {array.dtype} {array.shape} is no image. "
            "Give uint8 of (height, width) or (height, width, 3)."
        )
    return Image.fromarray(array)
