"""Hands that no face has: some letters of one face, the others of another."""

from functools import cached_property

import numpy as np

from paragraph_ocr.data import strokes
from paragraph_ocr.data.fonts import Face, Glyph
from paragraph_ocr.data.strokes import Measures

BORROWED = (0.2, 0.8)
"""Least and most of the characters that are the second face's."""

_CANDIDATES = 6

_RATIOS = 0.4, 2.5
"""Of the faces' sizes: an x without a foot or a head would give any."""


class MixedFace:
    """Two faces as one, serving where a `Face` does.

    The second face's letters are set at the size at which its x is as high as the first's.

    Args:
        borrowed: the characters that are the second face's.
        weights: of both faces.
    """

    def __init__(
        self,
        first: Face,
        second: Face,
        borrowed: frozenset[str],
        *,
        weights: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.first, self.second, self.borrowed = first, second, borrowed
        self._weights = weights
        heights = [
            strokes.measures(face, weight).x_height
            for face, weight in zip((first, second), weights, strict=True)
        ]
        self.ratio = float(np.clip(heights[0] / max(heights[1], 1e-6), *_RATIOS))
        """Of the second face's size to the first's."""
        self._sets: dict[int, _MixedGlyphs] = {}

    def drawn_weight(self, generator: np.random.Generator) -> None:
        """As `Face.drawn_weight`; both weights are chosen already."""

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.second.name}"

    @property
    def height(self) -> float:
        """As `Face.height`."""
        return max(self.first.height, self.ratio * self.second.height)

    def width(self, text: str) -> float:
        """As `Face.width`."""
        theirs = "".join(character for character in text if character in self.borrowed)
        ours = "".join(character for character in text if character not in self.borrowed)
        return self.first.width(ours) + self.ratio * self.second.width(theirs)

    def glyphs(self, size_px: int, weight: int | None = None) -> "_MixedGlyphs":
        """As `Face.glyphs`."""
        if size_px not in self._sets:
            self._sets[size_px] = _MixedGlyphs(self, size_px, self._weights)
        return self._sets[size_px]

    def unevenness(self) -> float:
        """Return how far from one another its two pens are: the logarithm of their ratio."""
        pens = [
            strokes.measures(face, weight).pen
            for face, weight in zip((self.first, self.second), self._weights, strict=True)
        ]
        return abs(float(np.log(self.ratio * pens[1] / pens[0])))

    @cached_property
    def measures(self) -> "MixedMeasures":
        first, second = self._weights
        return MixedMeasures(
            strokes.measures(self.first, first), strokes.measures(self.second, second), self
        )


class _MixedGlyphs(dict[str, Glyph]):
    def __init__(
        self, face: MixedFace, size_px: int, weights: tuple[int | None, int | None]
    ) -> None:
        super().__init__()
        self._borrowed = face.borrowed
        self._ours = face.first.glyphs(size_px, weights[0])
        self._theirs = face.second.glyphs(max(1, round(face.ratio * size_px)), weights[1])

    def __missing__(self, character: str) -> Glyph:
        self[character] = (self._theirs if character in self._borrowed else self._ours)[character]
        return self[character]


class MixedMeasures:
    """What `strokes.Measures` says of a face, of two."""

    def __init__(self, first: Measures, second: Measures, face: MixedFace) -> None:
        self._first, self._second, self._face = first, second, face
        self.x_height, self.pen = first.x_height, first.pen

    def ends(self, text: str) -> np.ndarray:
        """As `Measures.ends`."""
        borrowed = np.array([character in self._face.borrowed for character in text])
        theirs = self._face.ratio * self._second.ends(text)
        return np.where(borrowed[:, None, None], theirs, self._first.ends(text))


def drawn_mix(
    first: Face, faces: list[Face], characters: str, generator: np.random.Generator
) -> MixedFace:
    """Return a face with another's letters, which those are drawn at random.

    Of a few others it is the one whose pen is the most like its own: fine letters among broad ones would
    fade away.
    """
    chosen = generator.random(len(characters)) < generator.uniform(*BORROWED)
    borrowed = frozenset(c for c, taken in zip(characters, chosen, strict=True) if taken)
    weight = first.drawn_weight(generator)
    mixed = [
        MixedFace(first, second, borrowed, weights=(weight, second.drawn_weight(generator)))
        for second in (faces[i] for i in generator.integers(len(faces), size=_CANDIDATES))
    ]
    return min(mixed, key=MixedFace.unevenness)
