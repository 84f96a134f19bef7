"""From lines to a page: the sheet that they are put down on, its warp to the canvas, the pen and its ink."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

import cv2
import numpy as np

from paragraph_ocr.data import strokes
from paragraph_ocr.data.hand import Hand, Line

_CELL_PX = 64
"""Spacing of the control points of the wander."""

_STEP_PX = 8
"""Distance of the places at which the warp is computed; between them it is linear, to a few hundredths of a
pixel."""

_BLUR_PX = 2
"""How far the pen's blur spreads ink: half its kernel."""

_LEVELS = np.arange(256) / 255

_STROKE_PX = 12
"""Distance over which the pen's pressure changes."""


def lay(
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


def warp(
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


def inked(
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
