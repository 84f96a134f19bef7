"""Augmentation of one page on a CPU, by OpenCV: what `augment.py` does to a batch on its device."""

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from paragraph_ocr.data.augment import (
    BACK_FACTOR,
    COARSE_PX,
    FAINTEST_SPECK,
    FINE_PX,
    GAP_PX,
    INK,
    LARGE_SPECKS,
    NUM_STAINS,
    PITCH_PX,
    RING_INSIDE,
    RULE_PX,
    STAIN_EDGE,
    STAIN_PX,
    STAIN_STEP_PX,
    STAIN_UNEVEN,
    THRESHOLDS,
    Strengths,
    coarse_factor,
    coarse_share,
    spline,
)  # fmt: skip

_STEP_PX = 8
"""Distance of the places at which the displacement is computed; it is linear between them."""

_NOISE_SCALE, _NOISE_SPARE_PX = 32, 256


def augment_page(
    page: np.ndarray, strengths: Strengths, generator: np.random.Generator
) -> np.ndarray:
    """Return the page (uint8 (H, W): 0 is paper, 255 is ink) as another pen and scanner would give it.

    All that is random comes from the generator; the input is not modified. Ink stays on the page.
    """
    return augment_with_letters(page, None, strengths, generator)[0]


def augment_with_letters(
    page: np.ndarray,
    letters: np.ndarray | None,
    strengths: Strengths,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the page as `augment_page` does, and where places (n, 2) of x and y on it have gone, but for
    what `elastic_px` and `tremor_px` move them."""
    if strengths.move:
        view = _view(page, strengths, generator)
        sources = _sources(page, view, strengths, generator)
        if letters is not None:
            letters = _moved(letters, view, page.shape)
        page = cv2.remap(page, sources, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)  # type: ignore[call-overload]
    return _changed(page, strengths, generator), letters


def _changed(page: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Return the page after all that moves nothing."""
    page = _scanned(page, strengths, generator)
    if strengths.jpeg and generator.random() < 0.5:
        page = _compressed(page, strengths.jpeg * generator.random())
    return page


def _scanned(page: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Return the page as a scanner takes it."""
    uniform = generator.random
    if strengths.neighbours_px:
        page = _with_neighbours(page, strengths.neighbours_px, generator)
    if strengths.pen_px:
        reach = math.ceil(strengths.pen_px)
        square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
        other = cv2.dilate(page, square) if uniform() < 0.5 else cv2.erode(page, square)
        page = _mix(page, other, 0.5 * strengths.pen_px / reach * uniform())
    if strengths.blur_px:
        side = 2 * math.ceil(2 * strengths.blur_px) + 1
        blurred = cv2.GaussianBlur(
            page, (side, side), strengths.blur_px, borderType=cv2.BORDER_CONSTANT
        )
        page = _mix(page, blurred, uniform())
    if strengths.ink:
        page = cv2.convertScaleAbs(page, alpha=1 - strengths.ink * uniform())
    if strengths.rules:
        page = np.maximum(page, _rules(len(page), strengths.rules, generator))
    if strengths.coarse_px:
        coarse = _coarse(page, coarse_factor(strengths.coarse_px))
        page = _mix(page, coarse, uniform() * coarse_share(strengths.coarse_px))
    if strengths.specks and uniform() < 0.5:
        page = _with_specks(page, strengths.specks * uniform(), generator)
    if strengths.threshold and uniform() < strengths.threshold:
        level = generator.uniform(*THRESHOLDS) * page.max()
        return cv2.threshold(page, level, 255, cv2.THRESH_BINARY)[1]
    if strengths.show_through and uniform() < 0.5:
        # there is no other page: its own, turned over about its middle line
        back = _coarse(cv2.flip(page, 0), BACK_FACTOR)
        page = np.maximum(page, cv2.convertScaleAbs(back, alpha=strengths.show_through * uniform()))
    if strengths.stains and uniform() < 0.5:
        page = np.maximum(page, _stains(page.shape, strengths.stains, generator))
    if strengths.paper:
        page = np.maximum(page, _paper(page.shape, strengths.paper * uniform(), generator))
    if strengths.noise:
        top, left = generator.integers(_NOISE_SPARE_PX, size=2)
        grain = _grain(*(-(-length // _NOISE_SPARE_PX) for length in page.shape))
        grain = grain[top : top + page.shape[0], left : left + page.shape[1]]
        amount = 255 * strengths.noise * uniform() / _NOISE_SCALE
        page = cv2.addWeighted(page, 1, grain, amount, -128 * amount)
    return page


def _with_neighbours(
    page: np.ndarray, most_px: float, generator: np.random.Generator
) -> np.ndarray:
    """Return the page with strips of other lines at its edges, as `augment._with_neighbours` does."""
    inked = np.flatnonzero(page.max(axis=1) > INK * 255)
    if not len(inked):
        return page
    height, top, bottom = len(page), int(inked[0]), int(inked[-1])
    page = page.copy()
    writing = page[top : bottom + 1].copy()
    for room, upper in ((top - GAP_PX, True), (height - 1 - bottom - GAP_PX, False)):
        wanted = most_px * generator.random() * (generator.random() < 0.5)
        strip = int(min(max(0, min(wanted, room)), len(writing)))
        begin = int((len(writing) - strip) * generator.random())
        if strip:
            first = 0 if upper else height - strip
            page[first : first + strip] = writing[begin : begin + strip]
    return page


def _rules(height: int, most: float, generator: np.random.Generator) -> np.ndarray:
    """Return the lines of ruled paper, uint8 (H, 1); on half of the pages there are none."""
    pitch, thick = generator.uniform(*PITCH_PX), generator.uniform(*RULE_PX)
    lines = (np.arange(height) + pitch * generator.random()) % pitch < thick
    amount = 255 * most * generator.random() * (generator.random() < 0.5)
    return (lines * amount).astype(np.uint8)[:, None]


def _with_specks(page: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Return the page with specks of dust on a share of its pixels."""
    page, height, width = page.copy(), *page.shape
    for side, many in ((1, share), (2, share * LARGE_SPECKS)):
        count = generator.poisson(many * page.size)
        ys, xs = (generator.integers(length, size=count) for length in (height, width))
        dark = (255 * generator.uniform(FAINTEST_SPECK, 1, size=count)).astype(np.uint8)
        for y, x in np.ndindex(side, side):
            place = (ys + y).clip(max=height - 1), (xs + x).clip(max=width - 1)
            page[place] = np.maximum(page[place], dark)
    return page


def _stains(shape: tuple[int, ...], most: float, generator: np.random.Generator) -> np.ndarray:
    """Return blots and rings, uint8 (H, W), of at most a share `most` of full ink."""
    uniform = generator.uniform
    height, width = (-(-length // STAIN_STEP_PX) for length in shape)
    xs, ys = (np.arange(steps, dtype=np.float32) * STAIN_STEP_PX for steps in (width, height))
    field = _field(shape, COARSE_PX, generator)[1:-1, 1:-1]
    uneven = 1 + STAIN_UNEVEN * cv2.resize(field, (width, height))
    stains = np.zeros((height, width), np.float32)
    for _ in range(NUM_STAINS):
        x, y = xs - shape[1] * uniform(), ys - shape[0] * uniform()
        radius, edge = uniform(*STAIN_PX), uniform(*STAIN_EDGE)
        far = np.hypot(x, y[:, None]) * uneven / radius
        stain = np.clip((1 - far) / edge, 0, 1)
        if uniform() < 0.5:
            stain = np.maximum(RING_INSIDE * stain, 1 - 2 * np.abs(1 - far) / edge)
        stains = np.maximum(stains, stain * uniform())
    return _as_large(np.rint(255 * most * stains).astype(np.uint8), shape)


def _compressed(page: np.ndarray, lost: float) -> np.ndarray:
    """Return the page as JPEG keeps it at a quality that is less than the best by a share."""
    quality = max(1, round(100 * (1 - lost)))
    _, file = cv2.imencode(".jpg", 255 - page, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)
    assert decoded is not None
    return 255 - decoded


def _coarse(page: np.ndarray, factor: int) -> np.ndarray:
    """Return the page as a scanner with pixels `factor` times as large gives it, at its size."""
    height, width = (max(1, round(length / factor)) for length in page.shape)
    return _as_large(cv2.resize(page, (width, height), interpolation=cv2.INTER_AREA), page.shape)


def _as_large(page: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return cv2.resize(page, shape[::-1], interpolation=cv2.INTER_LINEAR)


def _sources(
    page: np.ndarray, view: "_View", strengths: Strengths, generator: np.random.Generator
) -> np.ndarray:
    """Return where each pixel comes from, float32 (H, W, 2), as (x, y) from the top left."""
    height, width = page.shape
    back, tilt, shift = view
    xs, ys = (
        ((np.arange(-1, math.ceil(length / _STEP_PX) + 1) + 0.5) * _STEP_PX - length / 2)
        for length in (width, height)
    )
    x, y = xs[None, :] - shift[0], ys[:, None] - shift[1]
    depth = 1 + tilt[0] * x + tilt[1] * y
    places = np.empty((len(ys), len(xs), 2), np.float32)
    for axis, length in enumerate((width, height)):
        found = (back[axis, 0] * x + back[axis, 1] * y) / depth
        places[..., axis] = found + (length / 2 - 0.5)
    for strength, spacing in (
        (strengths.elastic_px, COARSE_PX),
        (strengths.tremor_px, FINE_PX),
    ):
        if strength:
            amount = strength * generator.random()
            for axis in range(2):
                places[..., axis] += amount * _field(page.shape, spacing, generator)
    return _every_pixel(places, page.shape)


class _View(NamedTuple):
    """As `augment.View`, for one page."""

    back: np.ndarray  # (2, 2)
    tilt: np.ndarray  # (2,)
    shift: np.ndarray  # (2,)


def _moved(places: np.ndarray, view: _View, shape: tuple[int, ...]) -> np.ndarray:
    """Return where places (n, 2) of x and y on a page have gone: what the view maps back to them."""
    middle = np.array(shape[::-1]) / 2
    flat = (places - middle) @ np.linalg.inv(view.back).T
    moved = flat / (1 - flat @ view.tilt)[:, None] + view.shift + middle
    return moved.astype(np.float32)


def _view(page: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> _View:
    """Draw how the page is seen, all ink kept on it."""
    height, width = page.shape

    def either_way(strength: float) -> float:
        return strength * generator.uniform(-1, 1)

    angle = math.radians(either_way(strengths.rotation_deg))
    shear = math.tan(math.radians(either_way(strengths.shear_deg)))
    cos, sin = math.cos(angle), math.sin(angle)
    back = np.array([[cos, shear * cos - sin], [sin, shear * sin + cos]])
    back /= 1 + either_way(strengths.scale)
    tilt = np.array([either_way(strengths.perspective) for _ in range(2)])
    tilt /= (width / 2, height / 2)
    shift = np.array([either_way(strengths.translation_px) for _ in range(2)])

    reach = 1 + strengths.elastic_px + strengths.tremor_px
    bounds = []
    for axis, length in ((0, width), (1, height)):
        inked = np.flatnonzero(page.max(axis=axis) > INK * 255)
        ends = (inked[0], inked[-1]) if len(inked) else (length / 2, length / 2)
        bounds.append(np.array(ends) + 0.5 - length / 2)
    low_high = [(min(0.0, found[0]) - reach, max(0.0, found[1]) + reach) for found in bounds]
    corners = np.array([(x, y) for x in low_high[0] for y in low_high[1]]).T
    flat = np.linalg.inv(back) @ corners
    placed = flat / (1 - tilt @ flat)
    low, high = placed.min(axis=1), placed.max(axis=1)
    room = np.array([width, height]) - 2.0
    size = min(1.0, *(room / (high - low)))
    shift = np.minimum(np.maximum(shift, -room / 2 - low * size), room / 2 - high * size)
    return _View(back / size, tilt / size, shift)


def _field(shape: tuple[int, ...], spacing_px: int, generator: np.random.Generator) -> np.ndarray:
    """Return smooth noise between -1 and 1 at every _STEP_PX, one step beyond the page at each end."""
    down, across = (spline(length, spacing_px, _STEP_PX) for length in shape)
    points = generator.random((down.shape[1], across.shape[1]), np.float32)
    return np.clip(down @ (2 * points - 1) @ across.T, -1, 1)


def _paper(shape: tuple[int, ...], most: float, generator: np.random.Generator) -> np.ndarray:
    """Return a texture uint8 (H, W) of at most a share `most` of full ink."""
    coarse, fine = (_field(shape, spacing, generator) for spacing in (COARSE_PX, FINE_PX))
    texture = np.clip(0.5 * coarse + 0.3 * fine + 0.3, 0, 1)
    return _every_pixel(np.rint(255 * most * texture).astype(np.uint8), shape)


def _every_pixel(places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return values that are given at every step (see `_field`) at every pixel of a page."""
    size = (places.shape[1] * _STEP_PX, places.shape[0] * _STEP_PX)
    full = cv2.resize(places, size, interpolation=cv2.INTER_LINEAR)
    return full[_STEP_PX : _STEP_PX + shape[0], _STEP_PX : _STEP_PX + shape[1]]


@lru_cache(maxsize=16)
def _grain(down: int, across: int) -> np.ndarray:
    """Return Gaussian noise uint8: 128 is none, _NOISE_SCALE a deviation.

    One step of _NOISE_SPARE_PX larger than the page, whose size is given in such steps. Drawing normal
    numbers for every page would take longer than all the rest.
    """
    sides = [_NOISE_SPARE_PX * (steps + 1) for steps in (down, across)]
    drawn = np.random.default_rng(0).standard_normal(sides, np.float32)
    return np.clip(np.rint(128 + _NOISE_SCALE * drawn), 0, 255).astype(np.uint8)


def _mix(page: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    return cv2.addWeighted(page, 1 - share, other, share, 0)
