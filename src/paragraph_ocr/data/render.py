"""Paragraphs drawn in handwriting-like faces: the image, and the transcription as drawn.

Each line is set letter by letter, and upright. The letters of all lines are put down on a sheet, over the
strokes that join them or cross them out, and one warp carries the sheet to the canvas: slant, slope, scale,
and a smooth wander of the hand. Its bounds are known exactly, so that ink never leaves the canvas, and
nothing is computed where no ink can come.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import cv2
import numpy as np

from paragraph_ocr.data import strokes
from paragraph_ocr.data.fonts import Face, Glyphs, drawn_size
from paragraph_ocr.data.forms import Bent, Forms, Reaching
from paragraph_ocr.data.mixed_face import MixedFace, MixedMeasures
from paragraph_ocr.data.strokes import ENTERS, LEAVES, Bars, Measures

RENDERER_VERSION = 13
"""Part of every rendered store's fingerprint: raise it whenever the same arguments draw otherwise, or a store
keeps more of what is drawn."""

LARGEST_PX = 64
"""Greatest pitch of lines in pixels; a short note is not blown up to fill a page."""

_SPARE = 1.25
"""By how much a page that is to fill its canvas is drawn larger than its letters seem to allow, for what they
really take up is known only then; it is shrunk to fit."""

SMALLEST_PX = 8
"""Least size of a face in pixels: less is not legible."""

_CELL_PX = 64
"""Spacing of the control points of the wander."""

_STEP_PX = 8
"""Distance of the places at which the warp is computed; between them it is linear, to a few hundredths of a
pixel."""

_BLUR_PX = 2
"""How far the pen's blur spreads ink: half its kernel."""

_LEVELS = np.arange(256) / 255

_JITTER = np.array([0.07, 0.07, 0.12, 0.04, 0.03, 0.06])
"""Standard deviations at a jitter of 1: width, height, slant, turn (radians), lift and gap (em)."""

_STROKE_PX = 12
"""Distance over which the pen's pressure changes."""

_LOOSEST = 2.5
"""Most by which uneven lines as a whole stand farther apart than others."""

_SHORT, _SHORTEST = 0.3, 0.3
"""Share of uneven lines that end early, and the least part of the others' width that is left to them."""

_UNEVEN_ROOM = 1.5
"""How much more of a page uneven lines need than even ones as far apart: farther and shorter ones."""

_NARROWEST_PX = 11
"""Least pixels for a letter or blank, in the mean, down to which uneven lines may shrink a text. A line of
45 letters, as IAM's are, gives each 14."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A paragraph as drawn."""

    image: np.ndarray
    """uint8 (H, W): 0 is paper, 255 is ink."""
    lines: tuple[str, ...]
    boxes: np.ndarray
    """int (lines, 4): left, top, right, bottom in pixels around the ink of each line, generously."""
    letters: np.ndarray
    """int (n, 4): the same around each character of the text that is no white space, in its order, but
    without strokes that join it to others, cross it or run below it."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


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


_LEVEL = Slopes(0, 0, 0, 0, 1)


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


def render(
    words: Sequence[str],
    face: Face | MixedFace,
    *,
    height: int,
    width: int,
    min_lines: int,
    max_lines: int,
    jitter: float = 0.0,
    pressure: float = 0.0,
    joined: float = 0.0,
    word_slant_deg: float = 0.0,
    crossed_out: float = 0.0,
    baseline_wave: float = 0.0,
    uneven_lines: float = 0.0,
    stretch: float = 0.0,
    reach: float = 0.0,
    spread: float = 0.0,
    lean_deg: float = 0.0,
    line_slope_deg: float = 0.0,
    long_bars: float = 0.0,
    underlined: float = 0.0,
    forms: float = 0.0,
    generator: np.random.Generator,
) -> Drawing:
    """Return the words as one paragraph on a canvas of the given size in pixels, all ink inside.

    Drawn at random from the generator: number of lines, size, spacing, slant, slope, margins, pen.
    Fewer words than `min_lines` give as many lines as there are words.

    Args:
        jitter: how much each letter differs from others of its kind in size, slant, turn, place and
            distance; 1 is a careless hand, 0 sets type.
        pressure: share of the ink that comes and goes along the page.
        joined: share of neighbours among a word's lower-case letters that a stroke joins. A hand
            joins most of them or few.
        word_slant_deg: standard deviation of each word's own slant.
        crossed_out: share of paragraphs in which one or two words are crossed out. They are other
            words of the paragraph, written before the right ones, and not in the transcription.
        baseline_wave: em by which each line's baseline may drift either way from level.
        uneven_lines: share of paragraphs that are set as letters are: lines farther apart, at uneven
            distances, some of them short and standing anywhere; as far as the text leaves room for it.
        stretch: standard deviation of the logarithm of how much wider a hand's letters are than its face's.
        reach: the same of how much farther they reach above the height of x and below the line; never less.
        spread: most em by which letters stand farther apart, and are all joined. Half of the hands have none.
        lean_deg: most by which a hand leans farther to the right; half of them do not.
        line_slope_deg: standard deviation of the first line's slope, and of how much more the last one
            falls; a third of it for each line besides.
        long_bars: most heights of x by which a hand's strokes across t are longer than the letter is wide, in
            their mean; half of the hands cross it as their face does.
        underlined: share of paragraphs in which one or two words have a line below them.
        forms: heights of x by which a hand bends each kind of letter out of its face's form: the standard
            deviation of what moves points that lie about as far apart as an o is wide, in the mean of
            hands, which have none to twice as much.
    """
    uniform = generator.uniform
    extra = generator
    if any((joined, word_slant_deg, crossed_out, baseline_wave, uneven_lines, stretch,
            reach, spread, lean_deg, line_slope_deg, long_bars, underlined, forms)):  # fmt: skip
        (extra,) = generator.spawn(1)  # what it draws moves nothing else
    usual = spacing = uniform(0.85, 1.3) * face.height  # em from line to line
    stretched = math.exp(stretch * extra.normal(0, 1, size=1).clip(-2, 2)[0]) if stretch else 1.0
    reaching = math.exp(reach * min(2, abs(extra.normal()))) if reach else 1.0
    usual, spacing = usual * math.sqrt(reaching), spacing * math.sqrt(reaching)
    apart = spread * max(0.0, extra.uniform(-1, 1)) if spread else 0.0
    advances = np.array([stretched * face.width(word) + apart * len(word) for word in words])
    space = max(1.0, stretched) * max(0.25, face.width(" ")) * uniform(0.9, 1.6) + apart
    indent = uniform(0.5, 2.5) if generator.random() < 0.25 else 0.0

    struck = _mistakes(words, extra) if crossed_out and extra.random() < crossed_out else {}
    for place, mistake in struck.items():
        advances[place] += stretched * face.width(mistake) + apart * len(mistake) + space
    margins = np.array([width, height]) * uniform(0.01, 0.05, size=2)
    inner = np.array([width, height]) - 2 * margins
    total = advances.sum() + space * len(words)
    uneven = bool(uneven_lines) and extra.random() < uneven_lines
    if uneven:
        looser = _LOOSEST ** extra.random()
        num_letters = sum(len(word) + 1 for word in words)
        room = inner.prod() * total / (spacing * (_NARROWEST_PX * num_letters) ** 2) / _UNEVEN_ROOM
        uneven = room > 1
        spacing *= min(looser, max(room, 1))

    # the number of lines that would fill the canvas, were it free
    natural = math.sqrt(total * inner[1] / (inner[0] * spacing)) * math.exp(
        generator.normal(0, 0.15)
    )
    num_lines = int(np.clip(round(natural), min_lines, max_lines))
    part_widths = _part_widths(num_lines, extra) if uneven else np.ones(num_lines)
    starts, line_em = _wrap(
        advances,
        space=space,
        indent=indent,
        part_widths=part_widths,
        minimum=min_lines,
        generator=generator,
    )
    ends = [*pairwise([*starts, len(words)])]
    lines = [words[a:b] for a, b in ends]

    distances = np.full(len(lines), spacing)
    if uneven:
        distances *= 1 + extra.random(len(lines)) ** 2

    size = min(
        _SPARE * inner[0] / line_em,
        _SPARE * inner[1] / (distances[1:].sum() + face.height),
        LARGEST_PX * uniform(0.8, 1.0) / usual,
    )
    size_px = max(SMALLEST_PX, round(size))
    weight = face.drawn_weight(generator)
    lean = generator.normal(3, 6) + (lean_deg * max(0.0, extra.uniform(-1, 1)) if lean_deg else 0)
    slant = math.tan(math.radians(lean))
    slopes = _LEVEL
    if line_slope_deg:
        slopes = _slopes(math.radians(line_slope_deg), len(lines), line_em * size_px, extra)
    longer = long_bars * max(0.0, extra.uniform(-1, 1)) if long_bars else 0.0
    beneath = _some(words, extra) if underlined and extra.random() < underlined else []
    hand = Hand(
        face, weight, size_px, space * size_px, _pairs_joined(joined, extra) if not apart else 1.0,
        jitter, word_slant_deg, baseline_wave, stretched, reaching, apart * size_px, slopes,
        Bars.drawn(longer, extra) if longer else None,
        Forms(forms * extra.uniform(0, 2), extra) if forms else None, {},
    )  # fmt: skip
    set_lines = [
        _set_line(
            words[a:b],
            {place - a: mistake for place, mistake in struck.items() if a <= place < b},
            [place - a for place in beneath if a <= place < b],
            hand,
            place=place,
            generator=generator,
            extra=extra,
        )
        for place, (a, b) in enumerate(ends)
    ]
    lefts = generator.normal(0, 0.15 * size_px, size=len(lines))
    lefts[0] += indent * size_px
    if uneven:
        widths = np.array([advances[a:b].sum() + space * (b - a - 1) for a, b in ends])
        stands = extra.random(len(lines)) * (extra.random(len(lines)) < 0.5)
        lefts += stands * (line_em - widths).clip(min=0) * size_px
    sheet, boxes, letters = _lay(
        set_lines, lefts, hand, distances_px=distances * size_px, slant=slant, generator=generator
    )
    part, (top, left), boxes, letters = _warp(
        sheet, boxes, letters, slant=slant, inner=inner, margins=margins, height=height, width=width,
        wander_px=size_px * uniform(0.02, 0.09), generator=generator,
    )  # fmt: skip
    part = _ink(part, size_px=size_px, pressure=pressure, generator=generator)
    image = np.zeros((height, width), np.uint8)
    image[top : top + part.shape[0], left : left + part.shape[1]] = part
    return Drawing(image, tuple(map(" ".join, lines)), boxes, letters)


def _wrap(
    advances: np.ndarray,
    *,
    space: float,
    indent: float,
    part_widths: np.ndarray,
    minimum: int,
    generator: np.random.Generator,
) -> tuple[list[int], float]:
    """Return the first word of each line, and the width of the widest line, all in em.

    At most as many lines as there are parts of the width that they may take, each with its own right
    edge; at least `minimum` while there are words.
    """
    num_lines = len(part_widths)
    ends = np.cumsum(advances + space).tolist()
    drawn_edges = generator.uniform(0.85, 1.0, size=num_lines)
    drawn_edges[generator.integers(num_lines)] = 1.0
    edges = (drawn_edges * part_widths).tolist()

    def starts(line_em: float) -> list[int] | None:
        found = [0]
        for line in range(num_lines):
            begin = ends[found[-1] - 1] if found[-1] else -indent
            edge = begin + max(edges[line] * line_em, widest) + space + 1e-9
            after = max(bisect_left(ends, edge), found[-1] + 1)
            if after >= len(ends):
                return found
            found.append(after)
        return None

    widest = float(advances.max()) + indent
    low, high = 0.0, ends[-1] * 1.2 + widest + indent
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if starts(middle) is None else (low, middle)
    tight = starts(high)
    loose = starts(high * (1 + generator.uniform(0, 0.8 / num_lines)))  # a short last line
    chosen = loose if loose is not None and len(loose) >= minimum else tight
    assert chosen is not None
    while len(chosen) < min(minimum, len(advances)):  # break the longest line in two
        bounds = [*chosen, len(advances)]
        longest = int(np.argmax(np.diff(bounds)))
        chosen = sorted([*chosen, (bounds[longest] + bounds[longest + 1]) // 2])
    bounds = [*chosen, len(advances)]
    widths = [ends[b - 1] - (ends[a - 1] if a else -indent) for a, b in pairwise(bounds)]
    return chosen, float(max(widths)) - space


def _part_widths(num_lines: int, generator: np.random.Generator) -> np.ndarray:
    """Return which part of the width uneven lines may take; at least one all of it."""
    parts = np.ones(num_lines)
    short = generator.random(num_lines) < _SHORT
    short[generator.integers(num_lines)] = False
    parts[short] = generator.uniform(_SHORTEST, 1, size=short.sum())
    return parts


def _mistakes(words: Sequence[str], generator: np.random.Generator) -> dict[int, str]:
    """Return one or two words to be crossed out, by the places of the words they are written before."""
    places = _some(words, generator)
    others = generator.integers(1, max(2, len(words)), size=len(places)).tolist()
    return {p: words[(p + far) % len(words)] for p, far in zip(places, others, strict=True)}


def _some(words: Sequence[str], generator: np.random.Generator) -> list[int]:
    """Return the places of one or two words."""
    places: list[int] = generator.integers(len(words), size=1 + generator.integers(2)).tolist()
    return places


def _pairs_joined(joined: float, generator: np.random.Generator) -> float:
    """Return the share of a paragraph's pairs: `joined` in the mean, but rather all or none."""
    if joined in (0, 1):
        return joined
    return float(generator.beta(joined, 1 - joined))


def _slopes(
    deviation: float, num_lines: int, width_px: float, generator: np.random.Generator
) -> Slopes:
    first, more, bend = deviation * generator.normal(size=3).clip(-2, 2) * (1, 1, 0.5)
    return Slopes(first, more / num_lines, deviation / 3, bend, width_px)


def _set_line(
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
    if hand.slopes is not _LEVEL:
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


def _lay(
    lines: Sequence[Line],
    lefts: np.ndarray,
    hand: Hand,
    *,
    distances_px: np.ndarray,
    slant: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sheet with every letter on it, and the boxes of lines and letters on it in pixels.

    Lines lie about so far below the ones before. They are moved against the slant, so that their
    beginnings stand one under the other after it.
    """
    baselines = np.cumsum(distances_px * generator.uniform(0.93, 1.07, size=len(lines)))
    offsets = np.rint(np.stack([lefts + slant * baselines, baselines] * 2, axis=1)).astype(int)
    moved = [*zip(lines, offsets, strict=True)]
    bounds = np.array([line.bounds(hand.pen_px) + offset for line, offset in moved])
    origin = np.tile(bounds[:, :2].min(axis=0), 2)
    bounds -= origin
    offsets -= origin
    letters = np.concatenate([line.boxes + offset for line, offset in moved])
    sheet = np.zeros((bounds[:, 3].max(), bounds[:, 2].max()), np.uint8)
    curves = [curve + offset[:2] for line, offset in moved for curve in line.curves]
    if curves:
        strokes.draw(sheet, curves, pen_px=hand.pen_px)
    inks = chain.from_iterable(line.inks for line in lines)
    for ink, (left, top, right, bottom) in zip(inks, letters.tolist(), strict=True):
        part = sheet[top:bottom, left:right]
        cv2.max(part, ink, part)  # into the sheet; half of what np.maximum takes
    if any(line.struck for line in lines):
        firsts = accumulate((len(line.inks) for line in lines), initial=0)
        struck = [
            first + place
            for line, first in zip(lines, firsts, strict=False)
            for place in line.struck
        ]
        letters = np.delete(letters, struck, axis=0)
    return sheet, bounds, letters


def _warp(
    sheet: np.ndarray,
    boxes: np.ndarray,
    letters: np.ndarray,
    *,
    slant: float,
    inner: np.ndarray,
    margins: np.ndarray,
    height: int,
    width: int,
    wander_px: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, tuple[int, int], np.ndarray, np.ndarray]:
    """Return the part of the canvas that can hold ink, its top and left, and all boxes on the canvas.

    Ink keeps to the inner part of the canvas. The map from canvas to sheet is affine plus a wander, both
    given by control points of a cubic B-spline. The spline reproduces the affine part exactly and stays
    within the hull of its points, and so does what is linear between places on it: no ink is farther from
    its affine place than `wander_px` in x or y on the sheet.
    """
    slope = math.radians(float(np.clip(generator.normal(0, 0.8), -2, 2)))
    cos, sin = math.cos(slope), math.sin(slope)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, -slant], [0.0, 1.0]])

    reach = wander_px + 1.5  # and what the interpolation spreads
    spread = reach * np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])

    def placed_corners(boxes: np.ndarray) -> np.ndarray:  # (n, 4 corners, xy)
        return (boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]] + spread) @ forward.T

    def bounds(placed: np.ndarray) -> np.ndarray:
        canvas = placed * scale + shift
        ends = [np.floor(canvas.min(axis=1)), np.ceil(canvas.max(axis=1))]
        return np.concatenate(ends, axis=1).astype(int)

    placed = placed_corners(boxes)
    low, high = placed.min(axis=(0, 1)), placed.max(axis=(0, 1))
    scale = min(1.0, *(inner / (high - low)))
    free = inner - scale * (high - low)
    share = generator.beta((0.6, 0.8), (1.6, 1.6))  # notes start near the top left
    shift = margins + share * free - scale * low

    backward = np.linalg.inv(scale * forward)
    xs, ys, along_x, along_y = _spline(height, width)
    points = np.stack(np.meshgrid(xs, ys), axis=-1) - shift  # (rows, columns, xy)
    control = points @ backward.T + generator.uniform(-wander_px, wander_px, size=points.shape)
    # summed in float64: the order of a sum, which depends on BLAS's threads, moves no float32
    sources = along_y @ control.transpose(2, 0, 1) @ along_x
    on_canvas = bounds(placed)
    first = np.maximum(on_canvas[:, :2].min(axis=0) - _BLUR_PX - 1, 0)
    last = np.minimum(on_canvas[:, 2:].max(axis=0) + _BLUR_PX + 1, (width, height))
    every_pixel = _interpolated(sources.transpose(1, 2, 0).astype(np.float32), first, last)
    part = cv2.remap(sheet, every_pixel, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)  # type: ignore[call-overload]
    return part, (int(first[1]), int(first[0])), on_canvas, bounds(placed_corners(letters))


def _interpolated(coarse: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return values that are given at the places of `_axis` at every pixel from first to last, as (x, y)."""
    begin = first // _STEP_PX  # the place before that whose step holds the first pixel
    end = -(-last // _STEP_PX) + 2
    coarse = coarse[begin[1] : end[1], begin[0] : end[0]]
    size = (coarse.shape[1] * _STEP_PX, coarse.shape[0] * _STEP_PX)
    full = cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR)
    left, top = first - (begin - 1) * _STEP_PX
    right, bottom = last - (begin - 1) * _STEP_PX
    return full[top:bottom, left:right]


@lru_cache(maxsize=8)
def _spline(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of the control points along x and y, and their weights: x (points, places), y."""
    (xs, along_x), (ys, along_y) = _axis(width), _axis(height)
    return xs, ys, np.ascontiguousarray(along_x.T), along_y


def _axis(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of control points in pixels, and the weights (places, points).

    Places are the middles of steps of `_STEP_PX` over the length, and one more at either end.
    """
    points = np.arange(-2, math.ceil(length / _CELL_PX) + 3) * float(_CELL_PX)
    places = (np.arange(-1, math.ceil(length / _STEP_PX) + 1) + 0.5) * _STEP_PX - 0.5
    far = np.abs(places[:, None] - points) / _CELL_PX
    weights = np.where(
        far < 1, 2 / 3 - far**2 + far**3 / 2, np.where(far < 2, (2 - far) ** 3 / 6, 0.0)
    )  # the cubic B-spline
    return points, weights


def _ink(
    image: np.ndarray, *, size_px: int, pressure: float, generator: np.random.Generator
) -> np.ndarray:
    """Return the image with the pen's width and the ink's strength drawn at random."""
    blur_px = generator.uniform(0.35, 0.5 + 0.012 * size_px)
    threshold = generator.uniform(0.08, 0.34)  # low: a broad pen; high: a fine one
    contrast = generator.uniform(1.6, 3.0)
    strongest = generator.uniform(150, 255)
    side = 2 * _BLUR_PX + 1
    blurred = cv2.GaussianBlur(image, (side, side), blur_px)
    # hairlines of a small face are grey all over: thresholds count from what its strokes reach
    total, squares = (cv2.norm(blurred, kind) for kind in (cv2.NORM_L1, cv2.NORM_L2SQR))
    reached = min(1.0, 1.2 * squares / 255 / max(255.0, total))  # their mean, weighed by themselves
    levels = np.clip((_LEVELS / reached - threshold) * contrast, 0, 1) * strongest
    lut = levels.astype(np.uint8)
    if not pressure:
        return cv2.LUT(blurred, lut)
    # before the threshold: where the pen presses less, strokes grow thin, and some break
    cells = [max(2, side // _STROKE_PX) for side in image.shape]
    coarse = 1 - pressure * generator.random(cells, np.float32)
    pressed = cv2.resize(coarse, image.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.LUT(cv2.multiply(blurred, pressed, dtype=cv2.CV_8U), lut)
