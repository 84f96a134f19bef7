"""Augmentation of a whole batch on its device, every page with parameters of its own."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

_COARSE_PX, _FINE_PX = 96, 24
"""Distance of the control points of the two elastic displacements."""

_INK = 0.25
"""Share of full ink above which a pixel belongs to the writing, not to the paper's texture."""


class Augment(nn.Module):
    """Pages as another pen, hand, paper and scanner would give them.

    Strengths in pixels, degrees and shares; `conf/regularization/standard.yaml` says which. Each page
    draws its own between none and the full strength, from torch's global generator. Ink stays on the
    page: where it would leave, the page is moved less and shrunk more. All zero: the input itself is
    returned.
    """

    def __init__(
        self,
        *,
        rotation_deg: float = 0.0,
        shear_deg: float = 0.0,
        scale: float = 0.0,
        translation_px: float = 0.0,
        elastic_px: float = 0.0,
        pen_px: float = 0.0,
        blur_px: float = 0.0,
        ink: float = 0.0,
        paper: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.rotation, self.shear = math.radians(rotation_deg), math.radians(shear_deg)
        self.scale, self.translation_px = scale, translation_px
        self.elastic_px, self.pen_px, self.blur_px = elastic_px, pen_px, blur_px
        self.ink, self.paper, self.noise = ink, paper, noise
        self._moves = any((rotation_deg, shear_deg, scale, translation_px, elastic_px))
        self._works = self._moves or any((pen_px, blur_px, ink, paper, noise))

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 1 H W"]) -> UInt8[Tensor, "B 1 H W"]:
        if not self._works:
            return images
        pages = images.float() / 255
        if self._moves:
            grid = self._grid(pages)
            pages = F.grid_sample(pages, grid, padding_mode="zeros", align_corners=False)
        if self.pen_px:
            pages = self._pen(pages)
        if self.blur_px:
            pages = _mix(pages, _blur(pages, self.blur_px), _uniform(pages))
        if self.ink:
            pages = pages * (1 - self.ink * _uniform(pages))
        if self.paper:
            texture = _field(pages, _COARSE_PX) * 0.5 + _field(pages, _FINE_PX) * 0.3 + 0.3
            pages = torch.maximum(pages, self.paper * _uniform(pages) * texture.clamp(0, 1))
        if self.noise:
            pages = pages + self.noise * _uniform(pages) * torch.randn_like(pages)
        return (pages.clamp(0, 1) * 255).round().to(torch.uint8)

    def _grid(self, pages: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B H W 2"]:
        """Return where each pixel comes from: affine about the centre, and an elastic displacement."""
        batch, _, height, width = pages.shape

        def either_way(strength: float) -> Tensor:
            return strength * (2 * _uniform(pages)[:, 0, 0, 0] - 1)

        angle, shear = either_way(self.rotation), either_way(self.shear).tan()
        cos, sin = angle.cos(), angle.sin()
        back = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1).view(-1, 2, 2)
        back = back / (1 + either_way(self.scale)).view(-1, 1, 1)  # from page to source, in pixels
        shift = torch.stack([either_way(self.translation_px) for _ in range(2)], dim=1)
        back, shift = _keep_ink(pages, back, shift, reach=1 + self.elastic_px)

        half = torch.tensor([width / 2, height / 2], device=pages.device)
        offset = -(back @ shift.unsqueeze(2))
        affine = torch.cat([back * half, offset], dim=2) / half.view(1, 2, 1)
        grid = F.affine_grid(affine, [batch, 1, height, width], align_corners=False)
        if self.elastic_px:
            strength = self.elastic_px * _uniform(pages)
            moved = _field(pages, _COARSE_PX, 2) + 0.3 * _field(pages, _FINE_PX, 2)
            moved = strength * moved.clamp(-1, 1)
            grid = grid + moved.permute(0, 2, 3, 1) / half
        return grid

    def _pen(self, pages: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
        """Return strokes broader or finer by up to pen_px, half of the pages each."""
        reach = math.ceil(self.pen_px)
        broad = F.max_pool2d(pages, 2 * reach + 1, stride=1, padding=reach)
        fine = -F.max_pool2d(-pages, 2 * reach + 1, stride=1, padding=reach)
        amount = 0.5 * self.pen_px / reach * _uniform(pages)
        broader = _uniform(pages) < 0.5
        return torch.where(broader, _mix(pages, broad, amount), _mix(pages, fine, amount))


def _keep_ink(
    pages: Float[Tensor, "B 1 H W"],
    back: Float[Tensor, "B 2 2"],
    shift: Float[Tensor, "B 2"],
    *,
    reach: float,
) -> tuple[Float[Tensor, "B 2 2"], Float[Tensor, "B 2"]]:
    """Return the map, shrunk and shifted where it would carry ink off the page.

    A transcription must stay true to its image. `back` leads from page to source about the centre,
    `shift` moves the page, both in pixels; `reach` is how far anything else may move ink.
    """
    height, width = pages.shape[2:]
    ink = pages[:, 0] > _INK
    bounds = []
    for along, length in ((ink.any(dim=1), width), (ink.any(dim=2), height)):
        places = torch.arange(length, device=pages.device) + 0.5 - length / 2
        inside = torch.where(along, places, places.new_tensor(0.0))
        bounds += [inside.amin(dim=1) - reach, inside.amax(dim=1) + reach]
    left, right, top, bottom = bounds
    corners = torch.stack(
        [torch.stack([x, y], dim=1) for x in (left, right) for y in (top, bottom)], dim=2
    )
    placed = torch.linalg.inv(back) @ corners
    low, high = placed.amin(dim=2), placed.amax(dim=2)
    room = torch.tensor([width, height], device=pages.device) - 2.0
    size = (room / (high - low)).amin(dim=1, keepdim=True).clamp(max=1)
    low, high = low * size, high * size
    return back / size.unsqueeze(2), torch.clamp(shift, -room / 2 - low, room / 2 - high)


def _uniform(pages: Tensor) -> Tensor:
    """Return a number between 0 and 1 for each page, "B 1 1 1"."""
    return torch.rand(len(pages), 1, 1, 1, device=pages.device)


def _mix(pages: Tensor, others: Tensor, share: Tensor) -> Tensor:
    return pages + share * (others - pages)


def _field(pages: Tensor, spacing_px: int, channels: int = 1) -> Tensor:
    """Return smooth noise "B channels H W", mostly between -1 and 1, wavy at the spacing."""
    batch, _, height, width = pages.shape
    coarse = (max(2, height // spacing_px + 2), max(2, width // spacing_px + 2))
    points = 2 * torch.rand(batch, channels, *coarse, device=pages.device) - 1
    return F.interpolate(points, (height, width), mode="bicubic", align_corners=True)


def _blur(pages: Tensor, deviation_px: float) -> Tensor:
    reach = math.ceil(2 * deviation_px)
    offsets = torch.arange(-reach, reach + 1, device=pages.device)
    kernel = torch.exp(-0.5 * (offsets / deviation_px) ** 2)
    kernel = kernel / kernel.sum()
    across = F.conv2d(pages, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(across, kernel.view(1, 1, -1, 1), padding=(reach, 0))
