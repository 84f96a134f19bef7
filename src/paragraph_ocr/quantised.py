"""Weights as whole numbers of a byte: a model at a quarter of its size, read back as float32.

Each row of a matrix, and each output channel of a convolution, is its largest weight's share of 127.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALE = "::scale"
"""Behind the name of a tensor: the float32 factors of its rows. No parameter has such a name."""

_FEWEST = 1024  # numbers of a tensor; smaller ones stay as they are


def quantise(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices and convolutions as int8 with a scale for each row, and the rest as it is."""
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu()
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.numel() < _FEWEST:
            packed[name] = tensor.contiguous()
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        whole = (rows / scale[:, None]).round().to(torch.int8)
        packed[name] = whole.view(tensor.shape).contiguous()
        packed[name + _SCALE] = scale
    return packed


def restore(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `quantise` was given, to half a step of each row; other weights as they are.

    Raises:
        RuntimeError: a scale does not fit its tensor.
    """
    weights = {name: tensor for name, tensor in packed.items() if not name.endswith(_SCALE)}
    for name, tensor in weights.items():
        scale = packed.get(name + _SCALE)
        if scale is not None:
            if scale.shape != tensor.shape[:1]:
                raise RuntimeError(f"{name}: a scale of {[*scale.shape]} for {[*tensor.shape]}.")
            weights[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
    return weights
