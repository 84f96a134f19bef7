"""Lines as a hand writes them: letters one after another, and the strokes that no face has."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import cv2
import numpy as np

from paragraph_ocr.data import strokes
from paragraph_ocr.data.fonts import Face, Glyphs, drawn_size
from paragraph_ocr.data.forms import Bent, Forms, Reaching
from paragraph_ocr.data.mixed_face import MixedFace, MixedMeasures
from paragraph_ocr.data.strokes import ENTERS, LEAVES, Bars, Measures

SMALLEST_PX = 8
"""Least size of a face in pixels: less is not legible."""

_JITTER = np.array([0.07, 0.07, 0.12, 0.04, 0.03, 0.06])
"""Standard deviations at a jitter of 1: width, height, slant, turn (radians), lift and gap (em)."""


class Hand(NamedTuple):
    """What the lines of a paragraph have in common; jitter, slant and wave as `render` has them."""

    face: Face | MixedFace
    weight: int | None
    size_px: int
    space_px: float
    pairs_joined: float
    """Share of this paragraph's pairs of letters that are joined."""
    jitter: float
    word_slant_deg: float
    baseline_wave: float
    stretch: float
    """By how much letters are wider than the face's."""
    reach: float
    """By how much letters reach farther above the height of x and below the line than the face's."""
    spread_px: float
    """By which letters stand farther apart than the face's."""
    slopes: "Slopes"
    bars: Bars | None
    """Across its t; None leaves those of the face."""
    forms: Forms | None
    """Of its letters; None leaves those of the face."""
    sets: dict[int, Glyphs]
    """Letters of the hand's own made so far, by size."""

    @property
    def measures(self) -> Measures | MixedMeasures:
        if isinstance(self.face, MixedFace):
            return self.face.measures
        return strokes.measures(self.face, self.weight)

    def glyphs(self, size_px: int) -> Glyphs:
        """Return the letters that it writes, at a size of its face."""
        if size_px not in self.sets:
            letters = self.face.glyphs(size_px, self.weight)
            if self.reach != 1:
                x_height_px = round(self.measures.x_height * size_px)
                letters = Reaching(letters, x_height_px, self.reach)
            if self.forms is not None:
                letters = Bent(letters, self.measures.x_height * size_px, self.forms)
            self.sets[size_px] = letters
        return self.sets[size_px]

    def ends(self, text: str) -> np.ndarray:
        """Return where strokes come to letters and leave them, "letters ends xy" in em."""
        ends = self.measures.ends(text)
        if self.forms is None:
            return ends
        return self.forms.ends(text, ends / self.measures.x_height) * self.measures.x_height

    @property
    def pen_px(self) -> float:
        """Breadth of the strokes that are added: lightly, so a little less than the face's own."""
        return 0.85 * self.measures.pen * self.size_px


class Slopes(NamedTuple):
    """How far a paragraph's lines are from level. Slopes are tangents, down where positive."""

    first: float
    """Of the first line."""
    more: float
    """By which each line falls more than the one before."""
    uneven: float
    """Standard deviation of each line's own."""
    bend: float
    """By which a line falls more at its end than in its middle."""
    width_px: float
    """Of a full line."""

    def falls(self, place: int, xs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return how far the line at this place has fallen at some places along it, in pixels."""
        slope = self.first + place * self.more + self.uneven * generator.normal()
        return xs * (slope + self.bend * (xs / self.width_px - 1))

    @classmethod
    def drawn(
        cls, deviation: float, num_lines: int, width_px: float, generator: np.random.Generator
    ) -> "Slopes":
        """Return slopes as some hand has them, whose first line's has this standard deviation."""
        first, more, bend = deviation * generator.normal(size=3).clip(-2, 2) * (1, 1, 0.5)
        return cls(first, more / num_lines, deviation / 3, bend, width_px)


LEVEL = Slopes(0, 0, 0, 0, 1)
"""Of lines that do not slope."""


class Line(NamedTuple):
    """The letters of one line and the strokes between them, in pixels from where the baseline begins."""

    inks: list[np.ndarray]
    boxes: np.ndarray
    """int (n, 4): left, top, right, bottom of each letter's ink."""
    struck: list[int]
    """Places of the letters that are not part of the transcription."""
    curves: list[np.ndarray]
    """Each "curves points xy"."""

    def bounds(self, pen_px: float) -> np.ndarray:
        """Return left, top, right and bottom of all ink, its curves drawn by such a pen."""
        inked = [self.boxes, *(strokes.reach(several, pen_px=pen_px) for several in self.curves)]
        ends = np.concatenate(inked)
        return np.concatenate([ends[:, :2].min(axis=0), ends[:, 2:].max(axis=0)])


def set_line(
    words: Sequence[str],
    struck: Mapping[int, str],
    underlined: Sequence[int],
    hand: Hand,
    *,
    place: int,
    generator: np.random.Generator,
    extra: np.random.Generator,
) -> Line:
    """Return the letters of a line; words vary a little in height, size and distance.

    Args:
        struck: words to be crossed out, by the places of the words that are written after them.
        underlined: places of words that have a line below them.
        place: of the line in its paragraph, from 0.
        extra: draws all that is not letters and their places.
    """
    words, mistakes, underlined = _written(words, struck, underlined)
    size_px = hand.size_px
    shifts = generator.normal(0, 0.025 * size_px, size=len(words))
    gaps = hand.space_px * generator.uniform(0.8, 1.3, size=len(words))
    sizes = size_px + np.rint(generator.normal(0, 0.03 * size_px, size=len(words))).astype(int)
    sizes = np.maximum(SMALLEST_PX, sizes)
    varied = hand.jitter or hand.word_slant_deg or hand.stretch != 1
    # letters that are warped need not be shrunk before
    drawn = np.array([*map(drawn_size, sizes.tolist())]) if varied else sizes
    sets = [hand.glyphs(size) for size in drawn.tolist()]
    letters = [
        glyphs[character] for word, glyphs in zip(words, sets, strict=True) for character in word
    ]
    lengths = np.array([*map(len, words)])
    inks = [letter.ink for letter in letters]
    corners = np.array([(letter.left, letter.top) for letter in letters])
    boxes = np.concatenate([corners, corners + [ink.shape[::-1] for ink in inks]], axis=1)
    advances = np.array([letter.advance for letter in letters])
    ends = np.empty((len(inks), 0, 2))
    if hand.pairs_joined:
        ends = hand.ends("".join(words)) * np.repeat(drawn, lengths)[:, None, None]
    if varied:
        scales = np.repeat(sizes / drawn, lengths)
        leans = np.zeros(len(words))
        if hand.word_slant_deg:
            drawn_deg = hand.word_slant_deg * extra.normal(size=len(words)).clip(-2, 2)
            leans = np.tan(np.radians(drawn_deg))
        inks, boxes, advances, ends = _varied(
            inks, boxes, advances, ends, scales, np.repeat(leans, lengths), hand, generator
        )
    steps = advances + hand.spread_px
    steps[np.cumsum(lengths) - 1] += gaps
    pens = np.rint(np.cumsum(steps) - steps)
    baselines = np.repeat(shifts, lengths)
    if hand.baseline_wave:
        baselines += hand.baseline_wave * size_px * _wave(pens / size_px, extra)
    if hand.slopes is not LEVEL:
        baselines += hand.slopes.falls(place, pens, extra)
    moved = np.stack([pens, np.rint(baselines)] * 2, axis=1).astype(int)
    boxes = boxes + moved
    line, text = Line(inks, boxes, [], []), "".join(words)
    if hand.pairs_joined:
        _join(line, text, lengths, ends + moved[:, None, :2], hand, extra)
    if hand.bars:
        _cross(line, text, hand.bars, hand, extra)
    ends_of_words = np.cumsum(lengths).tolist()
    letters_of = [range(a, b) for a, b in pairwise([0, *ends_of_words])]
    for drawn_along, places in ((strokes.strikes, mistakes), (strokes.underline, underlined)):
        for word in places:
            its = letters_of[word]
            _run_along(line, its, drawn_along, float(baselines[its.start]), hand, extra)
    line.struck.extend(chain.from_iterable(letters_of[word] for word in mistakes))
    return line


def _written(
    words: Sequence[str], struck: Mapping[int, str], underlined: Sequence[int]
) -> tuple[Sequence[str], Sequence[int], Sequence[int]]:
    """Return all words that are written on a line, and the places of those crossed out and underlined."""
    if not struck:
        return words, (), underlined
    groups = [[struck[i], word] if i in struck else [word] for i, word in enumerate(words)]
    return (
        [*chain.from_iterable(groups)],
        [place + before for before, place in enumerate(sorted(struck))],
        [place + sum(other <= place for other in struck) for place in underlined],
    )


def _wave(places: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return how low the baseline lies at places along a line in em, -1 to 1: a swell, and a rise or fall."""
    rise, swell = generator.uniform(-1, 1), generator.uniform(0, 0.5)
    phase = places / generator.uniform(1.5, 5) + generator.uniform(0, 2 * math.pi)
    return rise * (places / max(1.0, places[-1]) - 0.5) + swell * np.sin(phase)


def _join(
    line: Line,
    text: str,
    lengths: np.ndarray,
    ends: np.ndarray,
    hand: Hand,
    generator: np.random.Generator,
) -> None:
    """Add strokes from lower-case letters to the next of their words, to some of those they do not touch."""
    lower = np.array([*map(str.islower, text)])
    pairs = lower[:-1] & lower[1:] & (generator.random(len(text) - 1) < hand.pairs_joined)
    pairs[np.cumsum(lengths)[:-1] - 1] = False
    pairs &= ends[1:, ENTERS, 0] > ends[:-1, LEAVES, 0]
    (lefts,) = np.nonzero(pairs)
    if len(lefts):
        from_to = np.stack([ends[lefts, LEAVES], ends[lefts + 1, ENTERS]], axis=1)
        line.curves.append(strokes.joins(from_to, size_px=hand.size_px))


def _cross(line: Line, text: str, bars: Bars, hand: Hand, generator: np.random.Generator) -> None:
    """Add a stroke across each t, besides the face's own."""
    (places,) = np.nonzero([character == "t" for character in text])
    if len(places):
        x_height_px = hand.measures.x_height * hand.size_px
        line.curves.append(bars.across(line.boxes[places], x_height_px, generator))


def _run_along(
    line: Line,
    word: range,
    drawn: Callable[..., list[np.ndarray]],
    baseline: float,
    hand: Hand,
    generator: np.random.Generator,
) -> None:
    """Add the strokes that are drawn along the letters of a word."""
    boxes = line.boxes[word.start : word.stop]
    curves = drawn(
        float(boxes[:, 0].min()),
        float(boxes[:, 2].max()),
        baseline,
        x_height_px=hand.measures.x_height * hand.size_px,
        generator=generator,
    )
    line.curves.extend(curve[None] for curve in curves)


def _varied(
    inks: Sequence[np.ndarray],
    boxes: np.ndarray,
    advances: np.ndarray,
    ends: np.ndarray,
    scales: np.ndarray,
    leans: np.ndarray,
    hand: Hand,
    generator: np.random.Generator,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Return each letter as it comes this time: stretched, slanted, turned and lifted, on the baseline.

    Args:
        boxes: "letters 4" from where the pen stands on the baseline; so are those returned.
        ends: "letters ends 2", places that go with the letter.
        scales: by which each letter is smaller than it was drawn.
        leans: the slant that each has from its word.
    """
    shape = (len(inks), len(_JITTER))
    drawn = generator.normal(0, hand.jitter, size=shape).clip(-2, 2) * _JITTER
    wide, high, slant, turn, lift, gap = drawn.T
    linear = np.empty((len(inks), 2, 2))
    wide = hand.stretch * (1 + wide)
    linear[:, 0, 0], linear[:, 0, 1] = scales * wide, scales * (slant + leans - turn)
    linear[:, 1, 0], linear[:, 1, 1] = scales * turn, scales * (1 + high)
    lifts = np.stack([np.zeros_like(lift), lift * hand.size_px], axis=1)
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]  # (n, 4 corners, xy)
    placed = corners @ linear.transpose(0, 2, 1) + lifts[:, None]
    low = np.floor(placed.min(axis=1)).astype(int) - 1
    high_ends = np.ceil(placed.max(axis=1)).astype(int) + 1
    shifts = (linear @ boxes[:, :2, None])[:, :, 0] + lifts - low
    matrices = np.concatenate([linear, shifts[:, :, None]], axis=2)
    sizes = (high_ends - low).tolist()
    varied = [
        cv2.warpAffine(ink, matrix, size, flags=cv2.INTER_LINEAR)
        for ink, matrix, size in zip(inks, matrices, sizes, strict=True)
    ]
    return (
        varied,
        np.concatenate([low, high_ends], axis=1),
        advances * scales * (wide + gap),
        ends @ linear.transpose(0, 2, 1) + lifts[:, None],
    )
