"""Paragraphs drawn in handwriting-like faces: the image, and the transcription as drawn.

Each line is set letter by letter, and upright. The letters of all lines are put down on a sheet, over the
strokes that join them or cross them out, and one warp carries the sheet to the canvas: slant, slope, scale,
and a smooth wander of the hand. Its bounds are known exactly, so that ink never leaves the canvas, and
nothing is computed where no ink can come.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from paragraph_ocr.data.fonts import Face
from paragraph_ocr.data.forms import Forms
from paragraph_ocr.data.hand import LEVEL, SMALLEST_PX, Hand, Slopes, set_line
from paragraph_ocr.data.mixed_face import MixedFace
from paragraph_ocr.data.sheet import inked, lay, warp
from paragraph_ocr.data.strokes import Bars

RENDERER_VERSION = 13
"""Part of every rendered store's fingerprint: raise it whenever the same arguments draw otherwise, or a store
keeps more of what is drawn."""

LARGEST_PX = 64
"""Greatest pitch of lines in pixels; a short note is not blown up to fill a page."""

_SPARE = 1.25
"""By how much a page that is to fill its canvas is drawn larger than its letters seem to allow, for what they
really take up is known only then; it is shrunk to fit."""

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
    slopes = LEVEL
    if line_slope_deg:
        slopes = Slopes.drawn(math.radians(line_slope_deg), len(lines), line_em * size_px, extra)
    longer = long_bars * max(0.0, extra.uniform(-1, 1)) if long_bars else 0.0
    beneath = _some(words, extra) if underlined and extra.random() < underlined else []
    hand = Hand(
        face, weight, size_px, space * size_px, _pairs_joined(joined, extra) if not apart else 1.0,
        jitter, word_slant_deg, baseline_wave, stretched, reaching, apart * size_px, slopes,
        Bars.drawn(longer, extra) if longer else None,
        Forms(forms * extra.uniform(0, 2), extra) if forms else None, {},
    )  # fmt: skip
    set_lines = [
        set_line(
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
    sheet, boxes, letters = lay(
        set_lines, lefts, hand, distances_px=distances * size_px, slant=slant, generator=generator
    )
    part, (top, left), boxes, letters = warp(
        sheet, boxes, letters, slant=slant, inner=inner, margins=margins, height=height, width=width,
        wander_px=size_px * uniform(0.02, 0.09), generator=generator,
    )  # fmt: skip
    part = inked(part, size_px=size_px, pressure=pressure, generator=generator)
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
