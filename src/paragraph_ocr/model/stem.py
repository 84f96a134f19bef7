"""The stem of a ResNet on a GPU, where its maps are largest; the numbers are those of its layers."""

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Stem:
    """The layers conv1, bn1, act1 and maxpool of a ResNet over grey pages, in one channel or repeated.

    In evaluation without gradients.
    """

    NUM_LAYERS = 4

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    @property
    def serves(self) -> bool:
        """Whether it can stand for its layers now: with batch statistics, or where nothing is learnt."""
        norm = self._net.get_submodule("bn1")
        learns = torch.is_grad_enabled() and any(
            p.requires_grad
            for name in ("conv1", "bn1")
            for p in self._net.get_submodule(name).parameters()
        )
        # not with SyncBatchNorm, which several GPUs make of it
        return _HAS_TRITON and type(norm) is nn.BatchNorm2d and (norm.training or not learns)

    @staticmethod
    def fits(net: nn.Module) -> bool:
        """Return whether a ResNet begins with the four layers of the classic stem."""
        names = [name for name, _ in net.named_children()]
        if names[: Stem.NUM_LAYERS] != ["conv1", "bn1", "act1", "maxpool"]:
            return False
        conv, norm, act, pool = (net.get_submodule(name) for name in names[: Stem.NUM_LAYERS])
        return (
            type(conv) is nn.Conv2d
            and conv.bias is None
            and type(norm) is nn.BatchNorm2d
            and bool(norm.momentum and norm.affine and norm.track_running_stats)
            and (conv.kernel_size, conv.stride) == ((7, 7), (2, 2))
            and (conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), 1)
            and type(act) is nn.ReLU
            and type(pool) is nn.MaxPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)
            and not pool.ceil_mode
        )

    def __call__(self, images: UInt8[Tensor, "B 1 H W"]) -> Float[Tensor, "B C h w"]:
        """Return the maps after pooling."""
        from paragraph_ocr.model import stem_kernels

        conv, norm = self._net.get_submodule("conv1"), self._net.get_submodule("bn1")
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        height, width = ((side + 1) // 2 for side in images.shape[2:])
        padded, kernel = windowed(conv, images)
        if not norm.training:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            return stem_kernels.stem_in_evaluation(padded, kernel, scale, shift, height, width)
        pooled, mean, variance, *_ = stem_kernels.stem_in_training(
            padded, kernel, norm.weight, norm.bias, height, width, norm.eps
        )
        assert norm.momentum is not None and norm.num_batches_tracked is not None
        with torch.no_grad():
            count = len(images) * height * width
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (count / max(1, count - 1)), norm.momentum)
        return pooled


def windowed(
    conv: nn.Conv2d, images: UInt8[Tensor, "B 1 H W"]
) -> tuple[Float[Tensor, "B rows columns"], Float[Tensor, "64 C"]]:
    """Return pages and weights of a 7x7 convolution of stride 2 as the kernels take them.

    A convolution of more channels sees the page in each.
    """
    autocast = torch.is_autocast_enabled(images.device.type)
    dtype = torch.get_autocast_dtype(images.device.type) if autocast else conv.weight.dtype
    # output y sees pixels 2y-3 to 2y+3, here 2y+1 to 2y+7; the first of eight weighs nothing
    spare = (-images.shape[3] % 16 + 12, 4 + images.shape[2] % 2)
    padded = F.pad(images[:, 0].to(dtype), (4, spare[0], 4, spare[1]))
    weight = F.pad(conv.weight.sum(dim=1), (1, 0, 1, 0))
    return padded, weight.flatten(1).T
