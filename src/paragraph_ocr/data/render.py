"""Paragraphs drawn in handwriting-like faces: the image, and the transcription as drawn.

Each line is put down letter by letter on a strip, straight and level. The lines are put on a sheet, and one
warp carries the sheet to the canvas: slant, slope, scale, and a smooth wander of the hand. Its bounds
are known exactly, so that ink never leaves the canvas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np

from paragraph_ocr.data.fonts import Face

RENDERER_VERSION = 2
"""Part of every rendered store's fingerprint: raise it whenever the same arguments draw otherwise."""

LARGEST_PX = 64
"""Greatest pitch of lines in pixels; a short note is not blown up to fill a page."""

SMALLEST_PX = 8
"""Least size of a face in pixels: less is not legible."""

_CELL_PX = 64
"""Spacing of the control points of the wander."""

_LEVELS = np.arange(256) / 255


@dataclass(frozen=True, slots=True)
class Drawing:
    """A paragraph as drawn."""

    image: np.ndarray
    """uint8 (H, W): 0 is paper, 255 is ink."""
    lines: tuple[str, ...]
    boxes: np.ndarray
    """int (lines, 4): left, top, right, bottom in pixels around the ink of each line, generously."""
    letters: np.ndarray
    """int (n, 4): the same around each character of the text that is no white space, in its order."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Strip(NamedTuple):
    """The ink of one line, cut to its bounds, and where its baseline begins on it, in pixels."""

    ink: np.ndarray
    x: int
    y: int
    letters: np.ndarray
    """Boxes of the letters on it, (n, 4)."""


def render(
    words: Sequence[str],
    face: Face,
    *,
    height: int,
    width: int,
    min_lines: int,
    max_lines: int,
    generator: np.random.Generator,
) -> Drawing:
    """Return the words as one paragraph on a canvas of the given size in pixels, all ink inside.

    Drawn at random from the generator: number of lines, size, spacing, slant, slope, margins, pen.
    Fewer words than `min_lines` give as many lines as there are words.
    """
    uniform = generator.uniform
    spacing = uniform(0.85, 1.3) * face.height  # em from line to line
    advances = np.array([face.width(word) for word in words])
    space = max(0.25, face.width(" ")) * uniform(0.9, 1.6)
    indent = uniform(0.5, 2.5) if generator.random() < 0.25 else 0.0

    margins = np.array([width, height]) * uniform(0.01, 0.05, size=2)
    inner = np.array([width, height]) - 2 * margins
    # the number of lines that would fill the canvas, were it free
    total = advances.sum() + space * len(words)
    natural = math.sqrt(total * inner[1] / (inner[0] * spacing)) * math.exp(
        generator.normal(0, 0.15)
    )
    num_lines = int(np.clip(round(natural), min_lines, max_lines))
    starts, line_em = _wrap(
        advances,
        space=space,
        indent=indent,
        num_lines=num_lines,
        minimum=min_lines,
        generator=generator,
    )
    lines = [words[a:b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]

    size = min(
        inner[0] * uniform(0.85, 1.0) / line_em,
        inner[1] / ((len(lines) - 1) * spacing + face.height),
        LARGEST_PX * uniform(0.6, 1.0) / spacing,
    )
    size_px = max(SMALLEST_PX, round(size))
    weight = None if face.weights is None else round(uniform(*face.weights) / 100) * 100
    slant = math.tan(math.radians(generator.normal(3, 6)))
    strips = [
        _draw_line(line, face, size_px, weight, space_px=space * size_px, generator=generator)
        for line in lines
    ]
    lefts = generator.normal(0, 0.15 * size_px, size=len(lines))
    lefts[0] += indent * size_px
    sheet, boxes = _lay(strips, lefts, pitch_px=spacing * size_px, slant=slant, generator=generator)
    letters = np.concatenate(
        [strip.letters + np.tile(box[:2], 2) for strip, box in zip(strips, boxes, strict=True)]
    )

    image, boxes, letters = _warp(
        sheet, boxes, letters, slant=slant, inner=inner, margins=margins, height=height, width=width,
        wander_px=size_px * uniform(0.02, 0.09), generator=generator,
    )  # fmt: skip
    return Drawing(
        _ink(image, size_px=size_px, generator=generator),
        tuple(map(" ".join, lines)),
        boxes,
        letters,
    )


def _wrap(
    advances: np.ndarray,
    *,
    space: float,
    indent: float,
    num_lines: int,
    minimum: int,
    generator: np.random.Generator,
) -> tuple[list[int], float]:
    """Return the first word of each line, and the width of the widest line, all in em.

    At most `num_lines` lines, each with its own right edge; at least `minimum` while there are words.
    """
    ends = np.cumsum(advances + space)
    edges = generator.uniform(0.85, 1.0, size=num_lines)
    edges[generator.integers(num_lines)] = 1.0

    def starts(line_em: float) -> list[int] | None:
        found = [0]
        for line in range(num_lines):
            begin = ends[found[-1] - 1] if found[-1] else -indent
            after = int(
                np.searchsorted(ends, begin + max(edges[line] * line_em, widest) + space + 1e-9)
            )
            after = max(after, found[-1] + 1)
            if after >= len(ends):
                return found
            found.append(after)
        return None

    widest = float(advances.max()) + indent
    low, high = 0.0, float(ends[-1]) * 1.2 + widest + indent
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


def _draw_line(
    words: Sequence[str],
    face: Face,
    size_px: int,
    weight: int | None,
    *,
    space_px: float,
    generator: np.random.Generator,
) -> Strip:
    """Return the ink of a level line; words vary a little in height, size and distance."""
    shifts = generator.normal(0, 0.025 * size_px, size=len(words))
    gaps = space_px * generator.uniform(0.8, 1.3, size=len(words))
    sizes = size_px + np.rint(generator.normal(0, 0.03 * size_px, size=len(words))).astype(int)
    placed = []
    pen = 0.0
    for word, shift, gap, size in zip(
        words, shifts.tolist(), gaps.tolist(), sizes.tolist(), strict=True
    ):
        glyphs = face.glyphs(max(SMALLEST_PX, size), weight)
        baseline = round(shift)
        for character in word:
            ink, left, top, advance = glyphs[character]
            placed.append((ink, round(pen) + left, baseline + top))
            pen += advance
        pen += gap
    x0 = min(x for _, x, _ in placed)
    y0 = min(y for _, _, y in placed)
    x1 = max(x + ink.shape[1] for ink, x, _ in placed)
    y1 = max(y + ink.shape[0] for ink, _, y in placed)
    strip = np.zeros((y1 - y0, x1 - x0), np.uint8)
    for ink, x, y in placed:
        part = strip[y - y0 : y - y0 + ink.shape[0], x - x0 : x - x0 + ink.shape[1]]
        np.maximum(part, ink, out=part)
    letters = [
        (x - x0, y - y0, x - x0 + ink.shape[1], y - y0 + ink.shape[0]) for ink, x, y in placed
    ]
    return Strip(strip, -x0, -y0, np.array(letters))


def _lay(
    strips: Sequence[Strip],
    lefts: np.ndarray,
    *,
    pitch_px: float,
    slant: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sheet with every line on it, and the lines' boxes on the sheet in pixels.

    Lines are moved against the slant, so that their beginnings stand one under the other after it.
    """
    pitches = pitch_px * generator.uniform(0.93, 1.07, size=len(strips))
    baselines = np.cumsum(pitches)
    offsets = [
        (round(left + slant * baseline) - strip.x, round(baseline) - strip.y)
        for strip, left, baseline in zip(strips, lefts, baselines, strict=True)
    ]
    boxes = np.array(
        [
            (x, y, x + strip.ink.shape[1], y + strip.ink.shape[0])
            for (x, y), strip in zip(offsets, strips, strict=True)
        ]
    )
    boxes = boxes - np.tile(boxes[:, :2].min(axis=0), 2)
    sheet = np.zeros((boxes[:, 3].max(), boxes[:, 2].max()), np.uint8)
    for strip, (left, top, right, bottom) in zip(strips, boxes, strict=True):
        part = sheet[top:bottom, left:right]
        np.maximum(part, strip.ink, out=part)
    return sheet, boxes


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the canvas, and the lines' and letters' boxes on it; ink keeps to the inner part of the canvas.

    The map from canvas to sheet is affine plus a wander, both given by control points of a cubic
    B-spline. The spline reproduces the affine part exactly and stays within the hull of its points,
    so that no ink is farther from its affine place than `wander_px` in x or y on the sheet.
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
    x, y = ((along_y @ control[..., axis] @ along_x).astype(np.float32) for axis in (0, 1))
    image = cv2.remap(sheet, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return image, bounds(placed), bounds(placed_corners(letters))


@lru_cache(maxsize=8)
def _spline(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of the control points along x and y, and the weights of each pixel."""
    (xs, along_x), (ys, along_y) = _axis(width), _axis(height)
    return xs, ys, np.ascontiguousarray(along_x.T), along_y


def _axis(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of control points in pixels, and the weights (length, points)."""
    places = np.arange(-1, math.ceil(length / _CELL_PX) + 2) * float(_CELL_PX)
    far = np.abs(np.arange(length)[:, None] - places) / _CELL_PX
    weights = np.where(
        far < 1, 2 / 3 - far**2 + far**3 / 2, np.where(far < 2, (2 - far) ** 3 / 6, 0.0)
    )  # the cubic B-spline
    return places, weights


def _ink(image: np.ndarray, *, size_px: int, generator: np.random.Generator) -> np.ndarray:
    """Return the image with the pen's width and the ink's strength drawn at random."""
    blur_px = generator.uniform(0.35, 0.5 + 0.012 * size_px)
    threshold = generator.uniform(0.08, 0.34)  # low: a broad pen; high: a fine one
    contrast = generator.uniform(1.6, 3.0)
    strongest = generator.uniform(150, 255)
    blurred = cv2.GaussianBlur(image, (5, 5), blur_px)
    # hairlines of a small face are grey all over: thresholds count from what its strokes reach
    counts = cv2.calcHist([blurred], [0], None, [256], [0, 256]).ravel() * _LEVELS
    reached = min(1.0, 1.2 * float(counts @ _LEVELS) / max(1.0, float(counts.sum())))
    levels = np.clip((_LEVELS / reached - threshold) * contrast, 0, 1) * strongest
    return cv2.LUT(blurred, levels.astype(np.uint8))
