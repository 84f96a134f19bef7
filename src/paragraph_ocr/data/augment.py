"""Augmentation of a whole batch on its device, every page with parameters of its own."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

_COARSE_PX, _FINE_PX = 96, 24
"""Distance of the control points of the two elastic displacements."""


class Augment(nn.Module):
    """Pages as another pen, hand, paper and scanner would give them.

    Strengths in pixels, degrees and shares; `conf/regularization/standard.yaml` says which. Each page
    draws its own between none and the full strength, from torch's global generator. All zero: the
    input itself is returned.
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
        size = 1 + either_way(self.scale)
        cos, sin = angle.cos() / size, angle.sin() / size
        ratio = height / width
        right = either_way(self.translation_px) * 2 / width
        down = either_way(self.translation_px) * 2 / height
        rows = [cos, (shear * cos - sin) * ratio, right, sin / ratio, shear * sin + cos, down]
        affine = torch.stack(rows, dim=1).view(batch, 2, 3)
        grid = F.affine_grid(affine, [batch, 1, height, width], align_corners=False)
        if self.elastic_px:
            strength = self.elastic_px * _uniform(pages)
            shape = (batch, 2, height, width)
            moved = _field(pages, _COARSE_PX, 2) + 0.3 * _field(pages, _FINE_PX, 2)
            assert moved.shape == shape
            to_unit = torch.tensor([2 / width, 2 / height], device=pages.device)
            grid = grid + (strength * moved).permute(0, 2, 3, 1) * to_unit
        return grid

    def _pen(self, pages: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
        """Return strokes broader or finer by up to pen_px, half of the pages each."""
        reach = math.ceil(self.pen_px)
        broad = F.max_pool2d(pages, 2 * reach + 1, stride=1, padding=reach)
        fine = -F.max_pool2d(-pages, 2 * reach + 1, stride=1, padding=reach)
        amount = 0.5 * self.pen_px / reach * _uniform(pages)
        broader = _uniform(pages) < 0.5
        return torch.where(broader, _mix(pages, broad, amount), _mix(pages, fine, amount))


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
