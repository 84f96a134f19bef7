"""What was read from an image, character by character and line by line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie just outside."""


@dataclass(frozen=True, slots=True)
class Character:
    character: str
    confidence: float
    """Probability that the model gave it, after the characters before it; 0 to 1."""


@dataclass(frozen=True, slots=True)
class Line:
    characters: tuple[Character, ...]
    box: Box
    """On the image, upright. An estimate: the model writes text and looks for no lines."""

    @property
    def text(self) -> str:
        return "".join(character.character for character in self.characters)

    @property
    def confidence(self) -> float:
        return mean_confidence(self.characters)


@dataclass(frozen=True, slots=True)
class Transcript:
    """The reading of one image."""

    source: str
    """The image's path, or "" if it had none."""
    size: tuple[int, int]
    """Height and width of the image in pixels, upright."""
    characters: tuple[Character, ...]
    """Newlines included."""
    log_probability: float
    """Of the whole text, its end included."""
    lines: tuple[Line, ...]

    @property
    def text(self) -> str:
        return "".join(character.character for character in self.characters)

    @property
    def confidence(self) -> float:
        """Mean confidence of the characters; of an empty text its probability."""
        return (
            mean_confidence(self.characters) if self.characters else math.exp(self.log_probability)
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """An image that could not be read, and why in one line."""

    source: str
    reason: str


def mean_confidence(characters: Sequence[Character]) -> float:
    """Return the mean confidence, 1 of no characters."""
    if not characters:
        return 1.0
    return sum(character.confidence for character in characters) / len(characters)


def split_lines(
    characters: Sequence[Character],
    page: np.ndarray,
    *,
    size: tuple[int, int],
    to_image: np.ndarray,
) -> tuple[Line, ...]:
    """Return the lines of a text, each with the part of the image where it most likely stands.

    Args:
        page: ink, uint8 (H, W), that the text was read from.
        size: height and width of the image.
        to_image: map (2, 3) from (x, y, 1) on the page to the image.
    """
    if not characters:
        return ()
    parts: list[list[Character]] = [[]]
    for character in characters:
        if character.character == "\n":
            parts.append([])
        else:
            parts[-1].append(character)
    return tuple(
        Line(tuple(part), _on_image(box, to_image, size))
        for part, box in zip(parts, bands(page, len(parts)), strict=True)
    )


def _on_image(box: Box, to_image: np.ndarray, size: tuple[int, int]) -> Box:
    """Return the upright box on the image, within it, around one on the page."""
    left, top, right, bottom = box
    corners = np.array([(x, y, 1) for x in (left, right) for y in (top, bottom)]) @ to_image.T
    most = np.array(size[::-1])
    first = np.clip(np.floor(corners.min(axis=0)), 0, most - 1).astype(int)
    last = np.clip(np.ceil(corners.max(axis=0)), first + 1, most).astype(int)
    return (*first.tolist(), *last.tolist())


_INK = 64  # grey level from which a pixel counts as ink
_ROWS = 160  # at most, of the profile in which lines are looked for
_EVENNESS = 2.0  # what a line of twice the mean height costs, in cuts through mean ink


def bands(page: np.ndarray, count: int) -> list[Box]:
    """Return boxes that part the ink of a page into so many lines, one below the other.

    Of all the ways to cut, the one with the least ink under the cuts and the evenest heights, found
    by dynamic programming over rows. A blank page is one of ink all over.
    """
    inked = page >= _INK
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    if not len(rows):
        rows, columns = np.arange(page.shape[0]), np.arange(page.shape[1])
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    cuts = _cuts(inked[top:bottom].sum(axis=1), count)
    boxes = []
    for first, last in pairwise(cuts):
        band = inked[top + first : top + last]
        own = np.flatnonzero(band.any(axis=0))
        start, stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (left, right)
        boxes.append((start, top + first, stop, top + max(last, first + 1)))
    return boxes


def _cuts(profile: np.ndarray, count: int) -> list[int]:
    """Return count + 1 rows from 0 to the length of the profile, in which cuts are made."""
    length = len(profile)
    even = [round(length * index / count) for index in range(count + 1)]
    step = -(-length // _ROWS)
    coarse = np.add.reduceat(profile, np.arange(0, length, step)).astype(float)
    places = len(coarse)
    if count == 1 or places < 2 * count:  # rows of a pixel: there is nothing to find
        return even
    ink = coarse / max(coarse.mean(), 1e-9)
    height = places / count
    gaps = np.arange(places + 1)[None, :] - np.arange(places + 1)[:, None]
    uneven = np.where(gaps > 0, _EVENNESS * (gaps / height - 1) ** 2, np.inf)
    # a cut at row r runs between r - 1 and r
    cost = np.concatenate([[0.0], np.minimum(ink[:-1], ink[1:]), [0.0]])
    total, came_from = uneven[0] + cost, []
    for _ in range(count - 1):
        ways = total[:, None] + uneven
        came_from.append(ways.argmin(axis=0))
        total = ways.min(axis=0) + cost
    cuts = [places]
    for origins in reversed(came_from):
        cuts.append(int(origins[cuts[-1]]))
    return [0, *(min(length, cut * step) for cut in reversed(cuts[1:])), length]
