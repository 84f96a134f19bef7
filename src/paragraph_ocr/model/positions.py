"""Fixed sine positions: of tokens along a text, and of cells on a feature grid."""

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 10_000.0
"""Ratio of the longest wavelength to the shortest (Vaswani et al. 2017)."""


def sine_code(
    length: int, channels: int, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "length channels"]:
    """Return sines (even channels) and cosines (odd) of positions 0, 1, 2 ...

    Wavelengths grow geometrically from 2*pi to 2*pi*BASE positions (Vaswani et al. 2017).

    Raises:
        ValueError: the number of channels is odd.
    """
    if channels % 2:
        raise ValueError(f"{channels} channels cannot be paired into sines and cosines")
    rates = BASE ** (-torch.arange(0, channels, 2, device=device) / channels)
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def add_grid_positions(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Return features plus a fixed 2-D sine code; the input is not modified.

    The first half of the channels codes the row, the second the column, both counted in feature
    cells from the top left.

    Raises:
        ValueError: C is not a multiple of 4 (each axis needs sine/cosine pairs).
    """
    channels, height, width = features.shape[1:]
    if channels % 4:
        raise ValueError(f"{channels} channels are not a multiple of 4")
    half = channels // 2
    rows = sine_code(height, half, device=features.device).T[:, :, None].expand(-1, -1, width)
    columns = sine_code(width, half, device=features.device).T[:, None, :].expand(-1, height, -1)
    return features + torch.cat([rows, columns]).to(features.dtype)
