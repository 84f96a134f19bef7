"""Letters as a hand forms them: a face's, with longer heads and tails, or each kind bent in its own way."""

import math

import cv2
import numpy as np

from paragraph_ocr.data.fonts import Glyph, Glyphs

_SPACING = 0.8
"""Distance of the points by which a letter is bent: about the width of an o. This and all below is in
heights of x, from the pen on the baseline."""

_FIRST = np.array([-1.5, -4.0])
"""The upper left one of the points. Ink beyond them moves as their edge does."""

_POINTS = 9  # either way
_FARTHEST, _OVERSHOOT = 2.5, 1.3
"""Deviations to which what is drawn is held, and by how much more a cubic between the points may reach."""

_CLOSING, _WIDEST_HOLE = 0.3, 0.25
"""Share of the kinds of letters in which the pen leaves no small holes and gaps, and the widest of these."""

_STEP_PX = 4
"""Distance of the places at which a bend is computed: a third of that of its points, on letters as drawn."""

_KINDS = 128
"""Of letters; two characters whose codes differ by this are bent alike."""


class Reaching(dict[str, Glyph]):
    """Letters whose ink reaches farther above the height of x and below the line."""

    def __init__(self, letters: Glyphs, x_height_px: int, reach: float) -> None:
        super().__init__()
        self._letters, self._x_height_px, self._reach = letters, x_height_px, reach

    def __missing__(self, character: str) -> Glyph:
        glyph = self._letters[character]
        above = int(np.clip(-self._x_height_px - glyph.top, 0, len(glyph.ink)))
        below = int(np.clip(glyph.top + len(glyph.ink), 0, len(glyph.ink) - above))
        head, middle, foot = np.split(glyph.ink, [above, len(glyph.ink) - below])
        head, foot = self._longer(head), self._longer(foot)
        ink = np.concatenate([head, middle, foot])
        self[character] = glyph._replace(ink=ink, top=glyph.top - len(head) + above)
        return self[character]

    def _longer(self, part: np.ndarray) -> np.ndarray:
        height, width = part.shape
        if not height:
            return part
        size = (width, round(self._reach * height))
        return cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)


class Forms:
    """How each kind of letter of a hand differs from its face's: an o is like all its others.

    Args:
        deviation: standard deviation, either way, of what moves the points by which a letter is bent.
    """

    def __init__(self, deviation: float, generator: np.random.Generator) -> None:
        moves = generator.standard_normal((_KINDS, _POINTS, _POINTS, 2), np.float32)
        self._moves = np.float32(deviation) * moves.clip(-_FARTHEST, _FARTHEST)
        closes = generator.random(_KINDS) < _CLOSING
        self._holes = closes * _WIDEST_HOLE * generator.random(_KINDS)
        self._farthest = _OVERSHOOT * _FARTHEST * deviation
        self._ends: dict[str, np.ndarray] = {}

    def bent(self, glyph: Glyph, character: str, x_height_px: float) -> Glyph:
        """Return the letter as the hand writes it; no ink of it is lost."""
        kind, room = ord(character) % _KINDS, math.ceil(self._farthest * x_height_px) + 1
        ink = cv2.copyMakeBorder(glyph.ink, room, room, room, room, cv2.BORDER_CONSTANT, value=0)
        left, top = glyph.left - room, glyph.top - room
        hole_px = round(self._holes[kind] * x_height_px)
        if hole_px > 1:
            pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (hole_px, hole_px))
            ink = cv2.morphologyEx(ink, cv2.MORPH_CLOSE, pen)
        sources = self._sources(kind, left, top, x_height_px, *ink.shape)
        ink = cv2.remap(ink, sources, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
        x, y, width, height = cv2.boundingRect(ink)
        if width:
            ink, left, top = ink[y : y + height, x : x + width], left + x, top + y
        return glyph._replace(ink=ink, left=left, top=top)

    def ends(self, text: str, ends: np.ndarray) -> np.ndarray:
        """Return where places of a text's letters, "letters ends xy", come to lie.

        A letter's places are those that it had when it was first asked for.
        """
        for character, places in zip(text, ends, strict=True):
            if character not in self._ends:
                kind = ord(character) % _KINDS
                grid = ((places - _FIRST) / _SPACING).astype(np.float32)[None]
                moves = cv2.remap(  # type: ignore[call-overload]
                    self._moves[kind], grid, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
                )
                self._ends[character] = places - moves[0]
        return np.array([self._ends[character] for character in text])

    def _sources(
        self, kind: int, left: int, top: int, x_height_px: float, height: int, width: int
    ) -> np.ndarray:
        """Return from which place on a letter's ink each of its pixels comes, "rows columns xy".

        It is computed every `_STEP_PX`, from a step before the first pixel to one after the last, and
        linear between.
        """
        columns, rows = (
            np.arange(-1, -(-side // _STEP_PX) + 1) * _STEP_PX + (_STEP_PX - 1) / 2
            for side in (width, height)
        )
        scale = _STEP_PX / x_height_px / _SPACING
        first = np.array([left + columns[0] + 0.5, top + rows[0] + 0.5])
        shift = (first / x_height_px - _FIRST) / _SPACING
        coarse = x_height_px * cv2.warpAffine(
            self._moves[kind],
            np.array([[scale, 0, shift[0]], [0, scale, shift[1]]]),
            (len(columns), len(rows)),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        coarse[..., 0] += columns
        coarse[..., 1] += rows[:, None]
        size = (len(columns) * _STEP_PX, len(rows) * _STEP_PX)
        fine = cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR)
        return fine[_STEP_PX : _STEP_PX + height, _STEP_PX : _STEP_PX + width]


class Bent(dict[str, Glyph]):
    """Letters of one size, as a hand forms them."""

    def __init__(self, letters: Glyphs, x_height_px: float, forms: Forms) -> None:
        super().__init__()
        self._letters, self._x_height_px, self._forms = letters, x_height_px, forms

    def __missing__(self, character: str) -> Glyph:
        glyph = self._letters[character]
        self[character] = self._forms.bent(glyph, character, self._x_height_px)
        return self[character]
