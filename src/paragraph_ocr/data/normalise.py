"""A page of ink made to look like rendered ones: level lines, their pitch, their margins.

Everything here takes ink, uint8 (H, W): 0 is paper, 255 is ink.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

NORMALISER_VERSION = 4
"""Part of the fingerprint of stores of normalised pages: raise it whenever a page comes out otherwise."""

STEEPEST_DEG = 6.0
"""Lines are looked for up to this slope."""

LEVEL_DEG = 0.5
"""Less is not turned: rendered pages slope by 0.8 (standard deviation)."""

PITCH_PX = 56.0
"""To which a page is scaled if its text then fits: the 95th percentile of `pitch_px` over 300 pages of
576x640 px each of datamodule=synthetic_paragraphs (56.5) and of synthetic_letters with even lines (57.7).
Large letters are read better than small ones."""

LEADING = (1.14, 2.25)
"""Least and most that counts of a pitch, in `letters_px`: 5th and 95th percentile over 300 pages of
synthetic_letters with even lines. Beyond, lines stand wide apart or a pitch was missed, and letters tell the
scale."""

MARGIN, LEAST_MARGIN = 0.03, 0.01
"""Shares of the canvas. Rendered pages keep margins of 1 to 5%: 3% where there is room."""

_INK = 64  # grey level from which a pixel counts as ink
_COARSE_PX = 600  # of the copy on which slope and pitch are found
_LEAST_PIXELS = 20  # of ink there; a page of less is blank
_SPECK_PIXELS = 3  # of ink there that are dust, and do not count

_DUST = 0.7
"""Squares of the pen's breadth, below which a piece of ink may be dust: the dot of an i is about one. It is
taken for dust where there are more such pieces than others."""

_TWO_LINES = 1.5
"""Height of ink in pitches, from which there surely are two lines: it is 1.7 to 2.2 of two rendered ones,
and 1.1 to 1.4 of what a single line takes for its pitch."""

_FAINTEST, _FAINTEST_OF_ONE = 0.05, 0.3
"""Autocorrelation below which a profile shows no pitch; and below which there may be but one line, which
reaches 0.25."""

_OCTAVE = 0.6
"""Share of the likeliest pitch's correlation from which a half or a third of it is believed instead."""

_STRIP, _GAP = 0.2, 0.15
"""Greatest height of a neighbour's strip, and least paper between it and the text, in pitches: the small
letters of a line are higher (0.3 and more of rendered ones), and the dots of an i are nearer to them."""


def normalise_page(page: np.ndarray, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the page as rendered ones are, and the map (2, 3) from its pixels to those of the page given.

    It is level, without dust and strips of neighbouring lines, and begins at the upper left margin of a
    canvas in pixels, which it covers. Its pitch is PITCH_PX if the text then fits; where lines stand wider
    apart than rendered ones, its letters are as large as at such a pitch. A blank page is only scaled down.

    The map takes (x, y, 1), of corners of pixels: 0 is the left edge of the first, 1 its right edge.
    """
    page = without_dust(page)
    slope = slope_deg(page)
    slope = slope if abs(slope) >= LEVEL_DEG else 0.0
    pitch = pitch_px(page, slope=slope)
    letters = letters_px(page)
    if pitch is not None and letters is not None:
        pitch = float(np.clip(pitch, *(letters * np.array(LEADING))))
        page = _without_strips(page, slope, pitch)
    cos, sin = math.cos(math.radians(slope)), math.sin(math.radians(slope))
    turn = np.array([[cos, sin], [-sin, cos]])
    low, high = _box(page, turn)
    canvas = np.array([width, height])
    room = canvas * (1 - 2 * LEAST_MARGIN)
    scale = float(np.min(room / (high - low)))
    scale = min(scale, 1.0 if pitch is None else PITCH_PX / pitch)
    margin = np.minimum(MARGIN * canvas, (canvas - scale * (high - low)) / 2)
    first = np.floor(low - margin / scale)
    last = np.ceil(high + margin / scale)

    shift = turn @ (0.5, 0.5) - first - 0.5  # OpenCV counts from the middles of pixels
    forward = np.column_stack([turn, shift])
    part = cv2.warpAffine(page, forward, tuple((last - first).astype(int)), flags=cv2.INTER_LINEAR)
    size = np.clip(np.round(np.array(part.shape[::-1]) * scale).astype(int), 1, canvas)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    filled = np.zeros((height, width), np.uint8)
    filled[: size[1], : size[0]] = cv2.resize(part, size.tolist(), interpolation=kind)
    backward = np.column_stack([turn.T * (part.shape[::-1] / size), turn.T @ first])
    return filled, backward


def without_dust(page: np.ndarray) -> np.ndarray:
    """Return the page without specks finer than its pen, if it is full of them."""
    inked = (page >= _INK).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(inked)
    if count < 3:
        return page
    # the pen is twice as broad as the ridges of its strokes are far from paper, broad strokes counting more
    depth = cv2.distanceTransform(inked, cv2.DIST_L2, 3)
    ridges = depth[(depth > 0) & (depth >= cv2.dilate(depth, np.ones((3, 3), np.uint8)))]
    pen_px = 2 * np.square(ridges).sum() / ridges.sum()
    dust = stats[:, cv2.CC_STAT_AREA] < _DUST * pen_px**2
    dust[0] = False  # paper
    if dust.sum() <= count / 2:
        return page
    # with the grey at its rim
    specks = cv2.dilate(dust[labels].astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.where(specks.astype(bool) & (dust | (np.arange(count) == 0))[labels], 0, page)


def slope_deg(page: np.ndarray) -> float:
    """Return how much lines fall from left to right, within STEEPEST_DEG either way; 0 of a blank page.

    It is where the profile of the rows along it is sharpest, in its sum of squares (Postl 1986). Over
    240 rendered pages of 1 to 12 lines, turned by up to 3.5 degrees, the error was 0.05 in the median and
    0.5 at most.
    """
    pixels = _pixels(page)
    if pixels is None:
        return 0.0
    found = 0.0
    for reach, step in ((STEEPEST_DEG, 0.5), (0.5, 0.1)):
        slopes = found + np.arange(-reach, reach + step / 2, step)
        sharpness = [np.square(_profile(*pixels, slope=slope)).sum() for slope in slopes]
        found = float(slopes[np.argmax(sharpness)])
    return float(np.clip(found, -STEEPEST_DEG, STEEPEST_DEG))


def pitch_px(page: np.ndarray, *, slope: float = 0.0) -> float | None:
    """Return the distance from line to line; of a single line its height; None of a blank page.

    It is the peak of the profile's autocorrelation. On 600 pages of synthetic_letters, all but 0.2% came
    within 10% of what their baselines give; on 313 of other sizes, from 2 lines on, all but 3%.

    Args:
        slope: of the lines, in degrees.
    """
    pixels = _pixels(page)
    if pixels is None:
        return None
    scale = _coarseness(page)
    profile = np.trim_zeros(_profile(*pixels, slope=slope))
    length = len(profile)
    spectrum = np.fft.rfft(profile - profile.mean(), 2 * length)
    alike = np.fft.irfft(np.abs(spectrum) ** 2, 2 * length)[:length]
    lags = np.arange(1, length - 1)
    peaks = lags[(alike[1:-1] >= alike[:-2]) & (alike[1:-1] > alike[2:])]
    own = np.argmax(alike < 0)  # up to there a line is like itself
    least = np.where(peaks <= length / _TWO_LINES, _FAINTEST, _FAINTEST_OF_ONE) * alike[0]
    peaks = peaks[(peaks > own) & (alike[peaks] >= least)]
    if not len(peaks):
        return length * scale
    best = peaks[np.argmax(alike[peaks])]
    alike /= np.arange(length, 0, -1)  # for each row that takes part
    for parts in (2, 3):  # every second line is like every other, too
        near = peaks[np.abs(peaks * parts / best - 1) < 0.1]
        if len(near) and alike[near].max() >= _OCTAVE * alike[best]:
            best = near[np.argmax(alike[near])]
            break
    return float(best * scale)


def letters_px(page: np.ndarray) -> float | None:
    """Return how high letters are, or words whose letters join; None of a blank page.

    It is the height of connected ink below which lie three fifths, each piece weighed by its height.
    """
    pieces = _pieces(page)
    heights = np.sort(pieces.heights[pieces.written])
    if not len(heights):
        return None
    summed = np.cumsum(heights)
    return float(heights[np.searchsorted(summed, 0.6 * summed[-1])] * _coarseness(page))


class _Pieces(NamedTuple):
    """Connected ink of a coarse copy of a page."""

    page: np.ndarray
    labels: np.ndarray
    """Of the copy's pixels; 0 is paper."""
    heights: np.ndarray
    """Of each label, in pixels."""
    written: np.ndarray
    """Whether a label is neither paper nor dust."""


def _pieces(page: np.ndarray) -> _Pieces:
    if _coarseness(page) > 1:
        width, height = (max(1, round(side / _coarseness(page))) for side in page.shape[::-1])
        page = cv2.resize(page, (width, height), interpolation=cv2.INTER_AREA)
    _, labels, stats, _ = cv2.connectedComponentsWithStats((page >= _INK).astype(np.uint8))
    written = stats[:, cv2.CC_STAT_AREA] > _SPECK_PIXELS
    written[0] = False
    return _Pieces(page, labels, stats[:, cv2.CC_STAT_HEIGHT], written)


def _pixels(page: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return y, x and strength of the inked pixels of a coarse copy without dust; None of a blank page."""
    pieces = _pieces(page)
    ys, xs = np.nonzero(pieces.written[pieces.labels])
    return (ys, xs, pieces.page[ys, xs].astype(float)) if len(ys) >= _LEAST_PIXELS else None


def _coarseness(page: np.ndarray) -> float:
    """Return how many pixels of the page a pixel of its coarse copy is wide."""
    return max(1.0, max(page.shape) / _COARSE_PX)


def _profile(ys: np.ndarray, xs: np.ndarray, ink: np.ndarray, *, slope: float) -> np.ndarray:
    """Return the ink along each row that slopes so many degrees, shared between the two nearest."""
    rows = ys - xs * math.tan(math.radians(slope))
    rows -= rows.min()
    above = rows.astype(int)
    below, length = rows - above, int(above.max()) + 2
    return np.bincount(above, ink * (1 - below), length) + np.bincount(
        above + 1, ink * below, length
    )


def _without_strips(page: np.ndarray, slope: float, pitch: float) -> np.ndarray:
    """Return the page without what neighbouring lines left at its upper and lower edge.

    A strip is taken out only if it is whole, thin, and parted from everything else by paper.
    """
    for _ in range(2):  # the lower edge is the upper one of the page turned over
        page, slope = _without_upper_strip(page, slope, pitch)[::-1], -slope
    return page


def _without_upper_strip(page: np.ndarray, slope: float, pitch: float) -> np.ndarray:
    edge = 1 + int(0.02 * pitch)
    if not (page[:edge] >= _INK).any():
        return page
    count, labels, stats, _ = cv2.connectedComponentsWithStats((page >= _INK).astype(np.uint8))
    at_edge = stats[:, cv2.CC_STAT_TOP] < edge
    at_edge[0] = False  # paper
    if at_edge.sum() == count - 1:
        return page
    ys, xs = np.nonzero(labels)
    owners, rows = labels[ys, xs].astype(np.intp), ys - xs * math.tan(math.radians(slope))
    tops, bottoms = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(tops, owners, rows)
    np.maximum.at(bottoms, owners, rows)
    text = ~at_edge
    text[0] = False
    thin = (bottoms - tops)[at_edge].max() <= _STRIP * pitch
    apart = tops[text].min() - bottoms[at_edge].max() >= _GAP * pitch
    if not (thin and apart):
        return page
    # with the grey at its rim
    strip = cv2.dilate(at_edge[labels].astype(np.uint8), np.ones((5, 5), np.uint8))
    return np.where(strip, 0, page).astype(np.uint8)


def _box(page: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest (x, y) of the ink once turned; of a blank page its own."""
    pixels = _pixels(page)
    if pixels is None:
        return np.zeros(2), np.array(page.shape[::-1], float)
    ys, xs, _ = pixels
    middles = turn @ np.stack([xs + 0.5, ys + 0.5])
    # a pixel of the coarse copy more: its edges, and what its size was rounded by
    low, high = middles.min(axis=1) - 1, middles.max(axis=1) + 1
    return low * _coarseness(page), high * _coarseness(page)
