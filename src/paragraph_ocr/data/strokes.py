"""Strokes of the pen that no face has: from letter to letter, across a t, through a word, below one."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import cv2
import numpy as np

from paragraph_ocr.data.fonts import Face, Glyph

ENTERS, LEAVES = 0, 1
"""Rows of a letter's ends: where a stroke comes to it, and where one goes on to the next."""

_MEASURED_PX = 64
"""Size at which faces are measured; fine enough for places, and quick."""

_ENTERS_WITHIN, _LEAVES_WITHIN, _LEAVES_HIGH_WITHIN = (0.2, 0.7), (-0.1, 0.4), (0.5, 1.05)
"""Heights above the baseline, in heights of x, between which a letter's ends are looked for."""

_LEAVING_HIGH = "bforvw"
"""Letters whose last stroke ends high: from its foot, an r would turn into an n, an o into an a."""

_NEAR_EM = 0.05
"""What is as near as this to the utmost ink counts as utmost."""

_TAIL_EM = 0.025
"""A foot that is farther to the right by this is a tail of the face's own, and the pen goes on from it."""

_SAG_EM = 0.05
"""How far below its ends a joining stroke may hang."""

_ALONG = np.linspace(0, 1, 5)[:, None]
_BEZIER = np.concatenate([(1 - _ALONG) ** 2, 2 * _ALONG * (1 - _ALONG), _ALONG**2], axis=1)

_SUBPIXEL_BITS = 4


class Measures:
    """A face as strokes see it, in em: its pen's breadth, its height of x, and the ends of its letters."""

    def __init__(self, face: Face, weight: int | None) -> None:
        self._ends: dict[str, np.ndarray] = {}
        self._glyphs = face.glyphs(_MEASURED_PX, weight)
        self.x_height = (
            max(1, -self._glyphs["x"].top) / _MEASURED_PX
        )  # of odd faces, too, more than 0
        ink = self._glyphs["n"].ink
        # a stroke's area by half its outline: what grey changes by, summed, is the outline's length
        across, down = np.gradient(np.pad(ink / 255, 1))
        self.pen = 2 * ink.sum() / 255 / np.hypot(across, down).sum() / _MEASURED_PX

    def ends(self, text: str) -> np.ndarray:
        """Return the ends "characters 2 xy" from where the pen stands on the baseline."""
        for character in {*text} - self._ends.keys():
            self._ends[character] = self._find(character)
        return np.array([self._ends[character] for character in text])

    def _find(self, character: str) -> np.ndarray:
        glyph, x_height = self._glyphs[character], self.x_height * _MEASURED_PX
        enters = _utmost(glyph, _ENTERS_WITHIN, x_height, right=False)
        leaves = _utmost(glyph, _LEAVES_WITHIN, x_height, right=True)
        if character in _LEAVING_HIGH:
            high = _utmost(glyph, _LEAVES_HIGH_WITHIN, x_height, right=True)
            if leaves[0] < high[0] + _TAIL_EM * _MEASURED_PX:
                leaves = high
        within_ink = np.array([[0.4, 0], [-0.4, 0]]) * self.pen
        return np.array([enters, leaves]) / _MEASURED_PX + within_ink


@lru_cache(maxsize=1024)  # as many as faces times weights
def measures(face: Face, weight: int | None) -> Measures:
    """Return what is measured of a face at a weight, kept for as long as it is in use."""
    return Measures(face, weight)


def _utmost(
    glyph: Glyph, within: tuple[float, float], x_height: float, *, right: bool
) -> tuple[float, float]:
    """Return the place (x, y) in pixels of the utmost ink within some heights: left, or lowest right.

    Of a letter that leaves high it is the highest right. Without ink at these heights, all counts.
    """
    low, high = within
    first = max(0, round(-high * x_height) - glyph.top)
    part = glyph.ink[first : max(first, round(-low * x_height) - glyph.top)] > 127
    if not part.any():
        first, part = 0, glyph.ink > 0
    columns = np.flatnonzero(part.any(axis=0))
    near = round(_NEAR_EM * _MEASURED_PX)
    if right:
        column = columns[-1]
        rows = np.flatnonzero(part[:, max(0, column - near) : column + 1].any(axis=1))
        row = rows[0] if within == _LEAVES_HIGH_WITHIN else rows[-1]
    else:
        column = columns[0]
        row = np.flatnonzero(part[:, column : column + near + 1].any(axis=1)).mean()
    return glyph.left + column + 0.5, glyph.top + first + row + 0.5


class Bars(NamedTuple):
    """How a hand crosses its t."""

    longer: float
    """Heights of x by which its strokes are longer than the letter is wide, in the mean."""
    depth: float
    """Share of the letter's height that is above them, in the mean."""
    slope: float
    """Tangent, down where positive, in the mean."""

    @classmethod
    def drawn(cls, longer: float, generator: np.random.Generator) -> "Bars":
        """Return bars of such a length as some hand has them."""
        return cls(longer, generator.uniform(0.05, 0.45), generator.normal(-0.1, 0.1))

    def across(
        self, boxes: np.ndarray, x_height_px: float, generator: np.random.Generator
    ) -> np.ndarray:
        """Return the curves "letters points xy" across letters in boxes "letters 4", in pixels.

        Most of what is longer is to the right; each stroke is longer or shorter, and some leave the letter.
        """
        left, top, right, bottom = boxes.T
        count = len(boxes)
        longer = self.longer * x_height_px * generator.uniform(0.2, 1.8, size=count)
        first = left - longer * generator.uniform(0, 0.4, size=count)
        length = right - left + longer
        depth = self.depth + generator.normal(0, 0.08, size=count)
        slope = self.slope + generator.normal(0, 0.05, size=count)
        xs = first[:, None] + length[:, None] * _ALONG.T
        bend = 0.06 * generator.normal(size=count)[:, None] * length[:, None]
        rise = (_ALONG.T - 0.5) * (slope * length)[:, None] + bend * (_ALONG.T * (1 - _ALONG.T))
        ys = (top + depth * (bottom - top))[:, None] + rise
        return np.stack([xs, ys], axis=-1)


def joins(ends: np.ndarray, *, size_px: int) -> np.ndarray:
    """Return the curves "pairs points xy" that join letters, given "pairs 2 xy": from where to where."""
    begin, end = ends[:, 0], ends[:, 1]
    middle = begin + 0.55 * (end - begin)
    # hanging between the letters as a garland, but not below what the lower end allows
    far = np.clip((end - begin)[:, 0], 0, size_px)
    middle[:, 1] = np.maximum(begin[:, 1], end[:, 1]) + _SAG_EM * far
    return _BEZIER @ np.stack([begin, middle, end], axis=1)


def strikes(
    left: float,
    right: float,
    baseline: float,
    *,
    x_height_px: float,
    generator: np.random.Generator,
) -> list[np.ndarray]:
    """Return the curves "points xy" by which a pen crosses out a word: lines, a zigzag, or a scribble.

    The word reaches from left to right, in pixels.
    """
    uniform = generator.uniform
    left, right = left - x_height_px * uniform(-0.1, 0.1), right + x_height_px * uniform(-0.2, 0.1)
    length = max(right - left, x_height_px)
    middle, half = baseline - 0.5 * x_height_px, 0.5 * x_height_px
    kind = generator.random()
    if kind < 0.6:  # one to three lines
        number = 1 + generator.integers(3)
        curves = []
        for place in range(number):
            along = np.linspace(0, 1, 8)
            height = middle + half * (1.2 * (place + 0.5 - number / 2) + uniform(-0.3, 0.3))
            tilt = half * uniform(-0.7, 0.7) * (along - 0.5)
            shake = half * generator.normal(0, 0.06, size=8).cumsum()
            ends = x_height_px * uniform(-0.1, 0.1, size=2)
            xs = left + ends[0] + (length + ends[1] - ends[0]) * along
            curves.append(np.stack([xs, height + tilt + shake], axis=1))
        return curves
    if kind < 0.8:  # there and back
        turns = max(4, round(length / x_height_px * uniform(1.5, 3)))
        along = (np.arange(turns) + uniform(-0.2, 0.2, size=turns)) / (turns - 1)
        sides = np.where(np.arange(turns) % 2, 1, -1) * uniform(0.8, 1.4, size=turns)
        return [np.stack([left + length * along, middle + half * sides], axis=1)]
    coils = max(3.0, length / x_height_px * uniform(1.2, 4))
    turned = np.linspace(0, 2 * np.pi * coils, round(12 * coils))
    wide, high = half * uniform(0.5, 1.0), half * uniform(0.9, 1.3)
    swell = 1 + 0.25 * np.sin(turned * uniform(0.21, 0.37) + uniform(0, 6))
    xs = left + wide / 2 + (length - wide) * turned / turned[-1] + wide * np.sin(turned)
    return [np.stack([xs, middle + high * swell * np.cos(turned)], axis=1)]


def underline(
    left: float,
    right: float,
    baseline: float,
    *,
    x_height_px: float,
    generator: np.random.Generator,
) -> list[np.ndarray]:
    """Return the one curve "points xy" below a word that reaches from left to right, in pixels."""
    uniform = generator.uniform
    along = np.linspace(0, 1, 8)
    low = baseline + x_height_px * uniform(0.15, 0.6)
    tilt = 0.3 * x_height_px * uniform(-1, 1) * (along - 0.5)
    shake = x_height_px * generator.normal(0, 0.03, size=8).cumsum()
    first, last = np.array([left, right]) + x_height_px * uniform(-0.4, 0.4, size=2)
    return [np.stack([first + (last - first) * along, low + tilt + shake], axis=1)]


def reach(curves: np.ndarray, *, pen_px: float) -> np.ndarray:
    """Return int (..., 4), left, top, right and bottom around the ink of curves "... points xy"."""
    wide = _thickness(pen_px) / 2 + 2  # and what smoothing spreads
    low, high = np.floor(curves.min(axis=-2) - wide), np.ceil(curves.max(axis=-2) + wide)
    return np.concatenate([low, high], axis=-1).astype(int)


def draw(sheet: np.ndarray, curves: Sequence[np.ndarray], *, pen_px: float) -> None:
    """Draw curves, each array "curves points xy", on a sheet without ink, by a pen of some pixels.

    Thickness is whole pixels to OpenCV: what is finer gets as much less ink.
    """
    thickness = _thickness(pen_px)
    level = min(255, round(255 * pen_px / thickness))
    scaled = [np.rint(several * 2**_SUBPIXEL_BITS).astype(np.int32) for several in curves]
    cv2.polylines(
        sheet, [*chain.from_iterable(scaled)], False, level, thickness, cv2.LINE_AA, _SUBPIXEL_BITS
    )


def _thickness(pen_px: float) -> int:
    return max(1, int(np.ceil(pen_px - 0.25)))
