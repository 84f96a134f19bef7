"""The stem of a ResNet on a GPU, where its maps are largest; the numbers are those of its layers."""

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_FOLDED_CHANNELS = 8
"""Channels of the folded pages: the fewest that a GPU's matrix units take."""


class Stem:
    """The layers conv1, bn1, act1 and maxpool of a ResNet over grey pages, in one channel or repeated."""

    NUM_LAYERS = 4

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Return whether a ResNet begins with the four layers of the classic stem."""
        names = [name for name, _ in net.named_children()]
        if names[: Stem.NUM_LAYERS] != ["conv1", "bn1", "act1", "maxpool"]:
            return False
        conv, _, act, pool = (net.get_submodule(name) for name in names[: Stem.NUM_LAYERS])
        return (
            type(conv) is nn.Conv2d
            and (conv.kernel_size, conv.stride) == ((7, 7), (2, 2))
            and (conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), 1)
            and type(act) is nn.ReLU
            and type(pool) is nn.MaxPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)
            and not pool.ceil_mode
        )

    def __call__(self, pages: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B C h w"]:
        """Return the maps after pooling."""
        net = self._net
        conv, norm = net.get_submodule("conv1"), net.get_submodule("bn1")
        assert isinstance(conv, nn.Conv2d)
        maps = folded_convolution(conv, pages)
        if norm.training and _HAS_TRITON and type(norm) is nn.BatchNorm2d and norm.momentum:
            return pooled_norm(norm, maps)
        return net.get_submodule("maxpool")(net.get_submodule("act1")(norm(maps)))


def folded_convolution(
    conv: nn.Conv2d, pages: Float[Tensor, "B 1 H W"]
) -> Float[Tensor, "B C h w"]:
    """Return a convolution of 7x7 and stride 2 over one channel, computed with 2x2 pixels as channels.

    With one channel a GPU's matrix units lie idle. Folded, the same products are a convolution of 4x4
    and stride 1 over four channels, three times as fast on an H100. A convolution of more channels
    sees the page in each.
    """
    height, width = pages.shape[2:]
    # output y sees pixels 2y-3 to 2y+3: folded rows y-2 to y+1, whose first pixel weighs nothing
    folded = F.pixel_unshuffle(F.pad(pages, (4, 2 + width % 2, 4, 2 + height % 2)), 2)
    weight = (
        F.pad(conv.weight.sum(dim=1, keepdim=True), (1, 0, 1, 0))
        .unflatten(3, (4, 2))
        .unflatten(2, (4, 2))
    )
    weight = weight.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    folded, weight = (
        F.pad(both, (0, 0, 0, 0, 0, _FOLDED_CHANNELS - 4)).contiguous(
            memory_format=torch.channels_last
        )
        for both in (folded, weight)
    )
    return F.conv2d(folded, weight, conv.bias)


def pooled_norm(norm: nn.BatchNorm2d, maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Return max_pool2d(relu(norm(maps)), 3, stride=2, padding=1), in training, with Triton."""
    from paragraph_ocr.model import stem_kernels

    assert norm.training and norm.momentum
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    maps = maps.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        mean, variance = stem_kernels.moments(maps.detach(), norm.running_mean)
        count = maps.numel() / maps.shape[1]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / max(1.0, count - 1)), norm.momentum)
        rate = torch.rsqrt(variance + norm.eps)
    return stem_kernels.pooled_norm(maps, norm.weight, norm.bias, mean, rate)[0]
