"""Augmentation: how strong, and a whole batch at once on its device, every page in its own way.

`augment_page.py` does the same to one page on a CPU. Both compose their effects in one order, from
one set of distributions, so that a strength means the same in either place.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

COARSE_PX, FINE_PX = 96, 24
"""Distance of the control points of the two elastic displacements, and of the paper's texture."""

INK = 0.25
"""Share of full ink above which a pixel belongs to the writing, not to the paper's texture."""


GAP_PX = 4
"""Paper left between the writing and what shows of its neighbours."""

PITCH_PX, RULE_PX = (20, 64), (1, 2)
"""Least and most distance of a ruled paper's lines, and their thickness."""

THRESHOLDS = 0.12, 0.4
"""Of a page's strongest ink, at which a scan in black and white is cut."""

BACK_FACTOR = 3
"""Pixels of the back of the sheet that run into one where it shows: as much as a blur by 1.5 px."""

NUM_STAINS, STAIN_PX, STAIN_EDGE = 3, (24, 90), (0.2, 0.7)
"""Stains on a page that has some, their least and most radius, and the share of it that their edge takes."""

STAIN_STEP_PX = 4
"""Distance of the places at which stains, which have no sharp edges, are computed."""

FAINTEST_SPECK, LARGE_SPECKS = 0.3, 1 / 32
"""Least share of full ink of a speck of dust; and how many are 2x2 pixels large for each of a single one."""

JPEG_BLOCK = 8
JPEG_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
"""To multiples of which a block's frequencies are rounded at quality 50 (ITU-T T.81, table K.1)."""

STAIN_UNEVEN, RING_INSIDE = 0.25, 0.25
"""Share by which a stain's outline leaves the circle, and of a ring's ink that is within it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strengths:
    """Most of each effect; a page draws its own between none and this, either way where there are two.

    `conf/regularization/standard.yaml` says what each is. All zero: pages stay as they are.
    """

    rotation_deg: float = 0.0
    shear_deg: float = 0.0
    scale: float = 0.0
    perspective: float = 0.0
    translation_px: float = 0.0
    elastic_px: float = 0.0
    tremor_px: float = 0.0
    pen_px: float = 0.0
    blur_px: float = 0.0
    ink: float = 0.0
    paper: float = 0.0
    noise: float = 0.0
    neighbours_px: float = 0.0
    rules: float = 0.0
    threshold: float = 0.0
    show_through: float = 0.0
    stains: float = 0.0
    coarse_px: float = 0.0
    specks: float = 0.0
    jpeg: float = 0.0

    def times(self, factor: float) -> "Strengths":
        """Return them all, each as many times as strong."""
        return Strengths(**{its.name: factor * getattr(self, its.name) for its in fields(self)})

    @property
    def move(self) -> bool:
        """Whether any of them moves ink from its place."""
        moving = (self.rotation_deg, self.shear_deg, self.scale, self.perspective)
        return any((*moving, self.translation_px, self.elastic_px, self.tremor_px))

    @property
    def work(self) -> bool:
        """Whether any of them is not zero."""
        return any(getattr(self, field.name) for field in fields(self))


class Augment(nn.Module):
    """Pages as another pen, hand, paper and scanner would give them.

    All that is random comes from torch's global generator. Ink stays on the page, which where `sizes`
    are given (height and width in pixels) is smaller than its canvas: where it would leave, the page is
    moved less and shrunk more. Without strengths the input itself is returned.
    """

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.strengths = strengths

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> UInt8[Tensor, "B 1 H W"]:
        return self.with_letters(images, None, sizes)[0]

    @torch.no_grad()
    def with_letters(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        letters: Float[Tensor, "B L 2"] | None,
        sizes: Int[Tensor, "B 2"] | None = None,
    ) -> tuple[UInt8[Tensor, "B 1 H W"], Float[Tensor, "B L 2"] | None]:
        """Return the pages, and where places of x and y in pixels on them have gone, but for what
        `elastic_px` and `tremor_px` move them."""
        strengths = self.strengths
        if not strengths.work:
            return images, letters
        coarse, fine = _curves(images, COARSE_PX), _curves(images, FINE_PX)
        pages = images.float() / 255
        if strengths.move:
            # filled on the device: a copy from the host would hold a GPU up
            sides = torch.cat([pages.new_full((1,), side) for side in pages.shape[:1:-1]])
            half = (sides.expand(len(pages), 2) if sizes is None else sizes.flip(1)) / 2
            reach = 1 + strengths.elastic_px + strengths.tremor_px
            view = _keep_ink(pages, self._view(pages, half), half, reach=reach)
            grid = self._grid(pages, view, half, sides, coarse, fine)
            if letters is not None:
                letters = view.moved(letters, half)
            pages = F.grid_sample(pages, grid, padding_mode="zeros", align_corners=False)
        if strengths.neighbours_px:
            pages = _with_neighbours(pages, sizes, strengths.neighbours_px)
        if strengths.pen_px:
            pages = _pen(pages, strengths.pen_px)
        if strengths.blur_px:
            pages = _mix(pages, _blur(pages, strengths.blur_px), _uniform(pages))
        if strengths.ink:
            pages = pages * (1 - strengths.ink * _uniform(pages))
        if strengths.rules:
            pages = torch.maximum(pages, _rules(pages, strengths.rules))
        if strengths.coarse_px:
            share = _uniform(pages) * coarse_share(strengths.coarse_px)
            pages = _mix(pages, _coarse(pages, coarse_factor(strengths.coarse_px)), share)
        if strengths.specks:
            pages = torch.maximum(pages, _specks(pages, strengths.specks))
        # of clean paper: a scanner cuts where it takes the writing for writing
        black_and_white = _cut(pages) if strengths.threshold else None
        if strengths.show_through:
            pages = torch.maximum(pages, _back(pages, sizes, strengths.show_through))
        if strengths.stains:
            pages = torch.maximum(pages, _stains(pages, coarse, strengths.stains))
        if strengths.paper:
            rough = _field(pages, coarse) * 0.5 + 0.3
            texture = torch.add(rough, _field(pages, fine), alpha=0.3)
            pages = torch.maximum(pages, strengths.paper * _uniform(pages) * texture.clamp(0, 1))
        if strengths.noise:
            most = strengths.noise * _uniform(pages)
            pages = torch.addcmul(pages, most, torch.randn_like(pages))
        if black_and_white is not None:
            chosen = _uniform(pages) < strengths.threshold
            pages = torch.where(chosen, black_and_white.to(pages.dtype), pages)
        if strengths.jpeg:
            quality = 100 * (1 - strengths.jpeg * _uniform(pages))
            pages = torch.where(_uniform(pages) < 0.5, compressed(pages, quality), pages)
        return (pages.clamp(0, 1) * 255).round().to(torch.uint8), letters

    def _grid(
        self,
        pages: Float[Tensor, "B 1 H W"],
        view: "View",
        half: Float[Tensor, "B 2"],
        sides: Float[Tensor, " 2"],
        coarse: "Curves",
        fine: "Curves",
    ) -> Float[Tensor, "B H W 2"]:
        """Return where each pixel comes from: projective about the centre, and elastic beyond it."""
        height, width = pages.shape[2:]
        middle = half + view.shift
        across = torch.arange(width, device=pages.device) + 0.5 - middle[:, :1]
        down = torch.arange(height, device=pages.device) + 0.5 - middle[:, 1:]

        def places(factors: Float[Tensor, "B n 2"]) -> Float[Tensor, "B n H W"]:
            """Return factors @ (across, down): a whole page only where the two meet."""
            columns, rows = factors[:, :, :1] * across[:, None], factors[:, :, 1:] * down[:, None]
            return columns[:, :, None] + rows[..., None]

        grid = places(view.back) / (1 + places(view.tilt[:, None]))
        for strength, curves in (
            (self.strengths.elastic_px, coarse),
            (self.strengths.tremor_px, fine),
        ):
            if strength:
                grid = torch.addcmul(grid, strength * _uniform(pages), _field(pages, curves, 2))
        scale = 2 / sides
        grid = grid * scale[:, None, None] + (half * scale - 1)[:, :, None, None]
        return grid.permute(0, 2, 3, 1)

    def _view(self, pages: Tensor, half: Float[Tensor, "B 2"]) -> "View":
        """Draw how each page is seen."""
        strengths = self.strengths

        def either_way(strength: float) -> Tensor:
            return strength * (2 * _uniform(pages)[:, 0, 0, 0] - 1)

        angle = either_way(math.radians(strengths.rotation_deg))
        shear = either_way(math.radians(strengths.shear_deg)).tan()
        cos, sin = angle.cos(), angle.sin()
        back = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1).view(-1, 2, 2)
        back = back / (1 + either_way(strengths.scale)).view(-1, 1, 1)
        tilt = torch.stack([either_way(strengths.perspective) for _ in range(2)], dim=1) / half
        shift = torch.stack([either_way(strengths.translation_px) for _ in range(2)], dim=1)
        return View(back, tilt, shift)


class View(NamedTuple):
    """The map from a place p of the new page to its source: back @ (p - shift) / (1 + tilt . (p - shift)).

    Pixels from the centre of the page, (x, y).
    """

    back: Float[Tensor, "B 2 2"]
    tilt: Float[Tensor, "B 2"]
    shift: Float[Tensor, "B 2"]

    def moved(
        self, places: Float[Tensor, "B L 2"], half: Float[Tensor, "B 2"]
    ) -> Float[Tensor, "B L 2"]:
        """Return where places on the page have gone, both in pixels from its top left.

        Args:
            half: of the page's extent.
        """
        flat = (places - half[:, None]) @ _inverse(self.back).transpose(1, 2)
        depth = 1 - flat @ self.tilt[:, :, None]
        return flat / depth + (self.shift + half)[:, None]


def _keep_ink(
    pages: Float[Tensor, "B 1 H W"], view: View, half: Float[Tensor, "B 2"], *, reach: float
) -> View:
    """Return the view, shrunk and shifted where it would carry ink off the page.

    A transcription must stay true to its image. `half` is half of each page's extent, `reach` how far
    in pixels anything else may move ink. A projective map keeps what is convex so: the corners of the
    ink's bounds bound it afterwards.
    """
    ink = pages[:, 0] > INK
    bounds = []
    for axis, along in enumerate((ink.any(dim=1), ink.any(dim=2))):
        places = torch.arange(along.shape[1], device=pages.device) + 0.5 - half[:, axis, None]
        inside = torch.where(along, places, 0.0)
        bounds += [inside.amin(dim=1) - reach, inside.amax(dim=1) + reach]
    left, right, top, bottom = bounds
    corners = torch.stack(
        [torch.stack([x, y], dim=1) for x in (left, right) for y in (top, bottom)], dim=2
    )
    flat = _inverse(view.back) @ corners
    placed = flat / (1 - view.tilt.unsqueeze(1) @ flat)
    low, high = placed.amin(dim=2), placed.amax(dim=2)
    room = 2 * half - 2.0
    size = (room / (high - low)).amin(dim=1, keepdim=True).clamp(max=1)
    low, high = low * size, high * size
    shift = torch.clamp(view.shift, -room / 2 - low, room / 2 - high)
    return View(view.back / size.unsqueeze(2), view.tilt / size, shift)


def _inverse(matrices: Float[Tensor, "B 2 2"]) -> Float[Tensor, "B 2 2"]:
    """Return the inverse of each matrix; torch's own waits for a GPU, to look for singular ones."""
    (a, b), (c, d) = (row.unbind(dim=-1) for row in matrices.unbind(dim=-2))
    return torch.stack([d, -b, -c, a], dim=-1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]


@lru_cache(maxsize=1024)  # pages of many sizes
def spline(length: int, spacing_px: int, step_px: int = 1) -> np.ndarray:
    """Return the weights (places, points) of control points `spacing_px` apart: Catmull and Rom's.

    Places are the centres of steps of `step_px`, over the length; with a step above 1, one more at
    either end. The curve goes through its points; between them it may go beyond them by a quarter.
    """
    extra = step_px > 1
    places = (np.arange(-extra, math.ceil(length / step_px) + extra) + 0.5) * step_px - 0.5
    points = np.arange(math.floor(places[0] / spacing_px) - 1, places[-1] / spacing_px + 2)
    far = np.abs(places[:, None] / spacing_px - points)
    near, wide = 1.5 * far**3 - 2.5 * far**2 + 1, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2
    return np.where(far < 1, near, np.where(far < 2, wide, 0.0)).astype(np.float32)


class Curves(NamedTuple):
    """`spline` on a page's device, for its height and its width."""

    down: Float[Tensor, "H points"]
    across: Float[Tensor, "W points"]


@torch.compiler.disable
def _curves(pages: Tensor, spacing_px: int) -> Curves:
    return Curves(*(_spline_on(pages.device, side, spacing_px) for side in pages.shape[2:]))


@lru_cache(maxsize=64)
def _spline_on(device: torch.device, length: int, spacing_px: int) -> Tensor:
    return torch.from_numpy(spline(length, spacing_px)).to(device)


def _field(pages: Tensor, curves: Curves, channels: int = 1) -> Tensor:
    """Return smooth noise "B channels H W" between -1 and 1, wavy at the spacing of the curves."""
    batch, (down, across) = len(pages), curves
    shape = (batch, channels, down.shape[1], across.shape[1])
    points = 2 * torch.rand(shape, device=pages.device) - 1
    return (down @ points @ across.T).clamp(-1, 1)


def _with_neighbours(
    pages: Float[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None, most_px: float
) -> Float[Tensor, "B 1 H W"]:
    """Return pages with a strip of other lines at half of the upper and of the lower edges.

    A strip is a part of the page's own writing, no higher than most_px, and GAP_PX away from it.
    """
    height, width = pages.shape[2:]
    rows = torch.arange(height, device=pages.device)
    heights = height if sizes is None else sizes[:, :1]
    inked = (pages[:, 0] > INK).any(dim=2)
    top = torch.where(inked, rows, height).amin(dim=1, keepdim=True)
    bottom = torch.where(inked, rows, -1).amax(dim=1, keepdim=True)
    source = rows.expand(len(pages), -1)
    for room, upper in ((top - GAP_PX, True), (heights - 1 - bottom - GAP_PX, False)):
        wanted = most_px * _uniform(pages)[:, 0, 0] * (_uniform(pages)[:, 0, 0] < 0.5)
        strip = torch.minimum(wanted, room).clamp(min=0).floor() * (bottom >= 0)
        strip = torch.minimum(strip, bottom - top + 1)
        begin = top + ((bottom - top + 1 - strip) * _uniform(pages)[:, 0, 0]).floor()
        first = 0 if upper else heights - strip
        within = (rows >= first) & (rows < first + strip)
        source = torch.where(within, (begin + rows - first).long(), source)
    return pages.gather(2, source[:, None, :, None].expand(-1, -1, -1, width))


def _cut(pages: Float[Tensor, "B 1 H W"]) -> Bool[Tensor, "B 1 H W"]:
    """Return which pixels a scan in black and white shows black."""
    low, high = THRESHOLDS
    return pages > (low + (high - low) * _uniform(pages)) * pages.amax(dim=(1, 2, 3), keepdim=True)


def _rules(pages: Tensor, most: float) -> Float[Tensor, "B 1 H 1"]:
    """Return the lines of ruled paper for half of the pages, of at most a share `most` of full ink."""
    rows = torch.arange(pages.shape[2], device=pages.device).view(1, 1, -1, 1)
    pitch = PITCH_PX[0] + (PITCH_PX[1] - PITCH_PX[0]) * _uniform(pages)
    thick = RULE_PX[0] + (RULE_PX[1] - RULE_PX[0]) * _uniform(pages)
    lines = (rows + pitch * _uniform(pages)) % pitch < thick
    return lines * (most * _uniform(pages) * (_uniform(pages) < 0.5))


def _specks(pages: Tensor, most: float) -> Float[Tensor, "B 1 H W"]:
    """Return the dust of half of the pages: specks on at most a share `most` of the pixels."""
    share = most * _uniform(pages) * (_uniform(pages) < 0.5)

    def drawn(step: int, share: Tensor) -> Tensor:
        height, width = (-(-side // step) for side in pages.shape[2:])
        chance = torch.rand(len(pages), 1, height, width, device=pages.device) / share
        return torch.where(chance < 1, 1 - (1 - FAINTEST_SPECK) * chance, 0.0)

    large = F.interpolate(drawn(2, 4 * LARGE_SPECKS * share), scale_factor=2, mode="nearest")
    return torch.maximum(drawn(1, share), large[..., : pages.shape[2], : pages.shape[3]])


def _back(
    pages: Float[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None, most: float
) -> Float[Tensor, "B 1 H W"]:
    """Return what half of the pages show of their back: the page before in the batch, mirrored."""
    places = torch.arange(pages.shape[3], device=pages.device)
    widths = pages.shape[3] if sizes is None else sizes[:, 1, None, None, None]
    mirrored = (widths - 1 - places).expand_as(pages)  # negative beyond the page
    back = pages.roll(1, dims=0).gather(3, mirrored.clamp(min=0)) * (mirrored >= 0)
    return _coarse(back, BACK_FACTOR) * (most * _uniform(pages) * (_uniform(pages) < 0.5))


def _stains(pages: Tensor, curves: "Curves", most: float) -> Float[Tensor, "B 1 H W"]:
    """Return the blots and rings of half of the pages, of at most a share `most` of full ink."""
    height, width = pages.shape[2:]
    xs = torch.arange(0, width, STAIN_STEP_PX, device=pages.device)
    ys = torch.arange(0, height, STAIN_STEP_PX, device=pages.device)[:, None]
    steps = Curves(curves.down[::STAIN_STEP_PX], curves.across[::STAIN_STEP_PX])
    uneven = 1 + STAIN_UNEVEN * _field(pages, steps)
    stains = torch.zeros_like(uneven)
    for _ in range(NUM_STAINS):
        x, y = xs - width * _uniform(pages), ys - height * _uniform(pages)
        radius = STAIN_PX[0] + (STAIN_PX[1] - STAIN_PX[0]) * _uniform(pages)
        edge = STAIN_EDGE[0] + (STAIN_EDGE[1] - STAIN_EDGE[0]) * _uniform(pages)
        far = (x * x + y * y).sqrt() / radius * uneven
        blot = ((1 - far) / edge).clamp(0, 1)
        ring = torch.maximum(RING_INSIDE * blot, (1 - 2 * (1 - far).abs() / edge).clamp(min=0))
        stain = torch.where(_uniform(pages) < 0.5, blot, ring) * _uniform(pages)
        stains = torch.maximum(stains, stain)
    stains = stains * (most * (_uniform(pages) < 0.5))
    return _as_large(stains, STAIN_STEP_PX, pages)


def compressed(
    pages: Float[Tensor, "B 1 H W"], quality: Float[Tensor, "B 1 1 1"]
) -> Float[Tensor, "B 1 H W"]:
    """Return pages as a JPEG keeps them, at a quality from 1 to 100 as libjpeg counts it.

    That is a cosine transform of each block, rounded to multiples of steps that grow as the quality falls.
    """
    height, width = pages.shape[2:]
    padded = F.pad(pages, (0, -width % JPEG_BLOCK, 0, -height % JPEG_BLOCK), mode="replicate")
    blocks = padded[:, 0].unflatten(1, (-1, JPEG_BLOCK)).unflatten(3, (-1, JPEG_BLOCK))
    cosines, steps = _jpeg_tables(pages.device)
    quality = quality[..., None].clamp(1, 100)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    steps = (factor * steps).add(0.5).floor().clamp(1, 255)
    # "B rows columns across down": paper is 127 and full ink -128 there
    levels = 127 - 255 * blocks.transpose(2, 3).clamp(0, 1)
    # paper may lie in the middle of two steps: rounded away from none, as libjpeg does, whatever floats say
    kept = (cosines @ levels @ cosines.T / steps * (1 + 1e-5)).round() * steps
    seen = (127 - cosines.T @ kept @ cosines) / 255
    return seen.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, None, :height, :width]


@torch.compiler.disable
@lru_cache(maxsize=8)
def _jpeg_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosine transform of a block's rows or columns, and the steps at quality 50."""
    places = np.arange(JPEG_BLOCK)
    cosines = np.cos(np.pi * np.outer(places, places + 0.5) / JPEG_BLOCK)
    cosines *= np.sqrt(np.where(places[:, None] == 0, 1, 2) / JPEG_BLOCK)
    tables = (cosines, JPEG_STEPS)
    return tuple(torch.tensor(table, dtype=torch.float32, device=device) for table in tables)  # type: ignore[return-value]


def coarse_factor(coarse_px: float) -> int:
    """Return how many pixels, across and down, run into one."""
    return max(2, math.ceil(coarse_px))


def coarse_share(coarse_px: float) -> float:
    """Return the most of the coarse page that is mixed in; all of it at a whole factor."""
    return coarse_px / coarse_factor(coarse_px)


def _coarse(pages: Float[Tensor, "B 1 H W"], factor: int) -> Float[Tensor, "B 1 H W"]:
    """Return pages as a scanner with pixels `factor` times as large gives them, at their size."""
    return _as_large(F.avg_pool2d(pages, factor, ceil_mode=True), factor, pages)


def _as_large(small: Tensor, factor: int, pages: Float[Tensor, "B 1 H W"]) -> Tensor:
    large = F.interpolate(small, scale_factor=factor, mode="bilinear")
    return large[..., : pages.shape[2], : pages.shape[3]]


def _pen(pages: Float[Tensor, "B 1 H W"], pen_px: float) -> Float[Tensor, "B 1 H W"]:
    """Return strokes broader or finer by up to pen_px, half of the pages each."""
    reach = math.ceil(pen_px)
    amount = 0.5 * pen_px / reach * _uniform(pages)
    sign = torch.where(_uniform(pages) < 0.5, 1.0, -1.0)  # strokes are finer where paper is broader
    extreme = F.max_pool2d(sign * pages, 2 * reach + 1, stride=1, padding=reach)
    return _mix(pages, sign * extreme, amount)


def _blur(pages: Tensor, deviation_px: float) -> Tensor:
    """Return pages blurred by a Gaussian; as sums of shifted pages, which torch.compile fuses."""
    reach = math.ceil(2 * deviation_px)
    weights = [math.exp(-0.5 * (offset / deviation_px) ** 2) for offset in range(-reach, reach + 1)]
    for axis, padding in ((3, (reach, reach)), (2, (0, 0, reach, reach))):
        length, padded = pages.shape[axis], F.pad(pages, padding)
        shifted = [padded.narrow(axis, first, length) for first in range(2 * reach + 1)]
        total = shifted[0] * (weights[0] / sum(weights))
        for page, weight in zip(shifted[1:], weights[1:], strict=True):
            total = torch.add(total, page, alpha=weight / sum(weights))
        pages = total
    return pages


def _uniform(pages: Tensor) -> Tensor:
    """Return a number between 0 and 1 for each page, "B 1 1 1"."""
    return torch.rand(len(pages), 1, 1, 1, device=pages.device)


def _mix(pages: Tensor, others: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(pages, others, share)
