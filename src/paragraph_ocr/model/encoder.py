"""The encoder: any of timm's ResNets, cut at a stage, with columns as narrow as wanted."""

import copy
import functools
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.errors import UserError, nearest


@functools.cache
def encoder_names() -> tuple[str, ...]:
    """Return the names of timm's ResNets."""
    return tuple(timm.list_models("*resnet*"))


def check_encoder_name(name: str) -> None:
    """Check that timm has the ResNet.

    Raises:
        UserError: it has not; gives the nearest names.
    """
    if name not in encoder_names():
        close = nearest(name, encoder_names())
        hint = f" (nearest: {', '.join(close)})" if close else ""
        raise UserError(
            f"model.encoder.name={name!r} is not one of timm's ResNets{hint}. "
            f"Pass model.encoder.name={close[0] if close else 'resnet18'}."
        )


class Encoder(nn.Module):
    """A page to a grid of features.

    Args:
        stage: feature stage to stop at; 0 is the stem, 4 the last of most ResNets.
        horizontal_stride: pixels a cell is wide, a power of two below the ResNet's own stride;
            the strides of the last stages are taken out of the width. None keeps the ResNet's own.
        in_channels: 1, or 3 to repeat grey for weights trained on colour.
        freeze: no gradients, and BatchNorm keeps its statistics in training too.
        extra: further arguments of timm's constructor.

    `stride` is (vertical, horizontal) in pixels a cell. Padding of the canvas (`sizes`) is invisible
    to the features in evaluation, but for blocks that pool the whole page (the se, eca, gc, sk and
    lambda families) and convolutions that do not pad (inception_resnet_v2).

    Raises:
        UserError: no such ResNet, stage or stride; weights that cannot be had; unknown extra.
    """

    def __init__(
        self,
        name: str,
        *,
        stage: int,
        horizontal_stride: int | None = None,
        in_channels: int = 1,
        pretrained: bool = False,
        freeze: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_encoder_name(name)
        self.name = name
        self.net = _build(name, stage, in_channels, pretrained, extra or {})
        self.channels: int = self.net.feature_info.channels()[-1]
        own = self.net.feature_info.reduction()[-1]
        self.stride: tuple[int, int] = (own, horizontal_stride or own)
        self.in_channels = in_channels
        self.frozen = freeze
        if horizontal_stride is not None:
            _narrow_columns(self.net, name, own, horizontal_stride, in_channels)
        self.requires_grad_(not freeze)
        self.train()
        self._true_sizes: tuple[Tensor, tuple[int, int]] | None = None
        for module in self.net.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                module.register_forward_pre_hook(self._blank_padding)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(mode and not self.frozen)

    def check_canvas(self, height: int, width: int) -> None:
        """Check, without computing anything, that the ResNet takes pages of this size.

        Raises:
            UserError: it takes but one size, as hybrids with position tables do.
        """
        net = copy.deepcopy(self.net).to("meta")
        try:
            net(torch.empty(1, self.in_channels, height, width, device="meta"))
        except RuntimeError as error:
            raise UserError(
                f"model.encoder.name={self.name} does not take pages of {height}x{width} px. "
                "Pass another name, such as resnet18, or what timm needs for it under "
                "+model.encoder.extra."
            ) from error

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the features of a canvas given in pixels."""
        return math.ceil(height / self.stride[0]), math.ceil(width / self.stride[1])

    def forward(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Return the features of the last stage.

        Args:
            images: 0 is paper, 255 is ink.
            sizes: true height and width in pixels; None if every page fills the canvas.
        """
        pages = images.to(torch.float32) / 255
        if self.in_channels == 3:
            pages = pages.expand(-1, 3, -1, -1)
        self._true_sizes = None if sizes is None else (sizes, images.shape[2:])
        (features,) = self.net(pages)
        self._true_sizes = None
        return features

    def cells(self, sizes: Int[Tensor, "B 2"], grid: tuple[int, int]) -> Tensor:
        """Return a mask "B 1 h w" of the cells that lie on the true page."""
        stride = torch.tensor(self.stride, device=sizes.device)
        return _inside((sizes + stride - 1) // stride, grid)

    def _blank_padding(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Zero what lies beyond the true page, as a convolution's own padding would be."""
        if self._true_sizes is None:
            return None
        sizes, canvas = self._true_sizes
        level = inputs[0].shape[2:]
        if level == (1, 1):  # inside an attention block
            return None
        stride = torch.tensor(
            [round(c / s) for c, s in zip(canvas, level, strict=True)], device=sizes.device
        )
        mask = _inside((sizes + stride - 1) // stride, level)
        return (inputs[0] * mask, *inputs[1:])


def _inside(sizes: Int[Tensor, "B 2"], grid: tuple[int, ...]) -> Tensor:
    """Return a mask "B 1 h w" that is true in the top left corner of each size."""
    rows = torch.arange(grid[0], device=sizes.device) < sizes[:, 0, None]
    columns = torch.arange(grid[1], device=sizes.device) < sizes[:, 1, None]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _build(
    name: str, stage: int, in_channels: int, pretrained: bool, extra: dict[str, Any]
) -> nn.Module:
    options = {"features_only": True, "out_indices": (stage,), "in_chans": in_channels, **extra}
    file = dict(extra.get("pretrained_cfg_overlay", {})).get("file")
    if pretrained and file is not None and not Path(file).is_file():
        raise UserError(
            f"model.encoder.extra.pretrained_cfg_overlay.file={file} does not exist. "
            "Pass the path of a weights file."
        )
    if not pretrained:
        try:
            return timm.create_model(name, **options)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.encoder.extra={extra} does not suit {name}: {error}. "
                "Pass only arguments of timm's constructor."
            ) from error
        except (AssertionError, IndexError) as error:
            raise UserError(
                f"model.encoder.stage={stage} is not a stage of {name}. "
                "Pass model.encoder.stage=3 or fewer."
            ) from error
    try:
        with _quick_hub(needed=file is None):
            return timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.encoder.pretrained=true: the weights of {name} cannot be had "
            f"({type(error).__name__}). Connect to the network, or pass a local file with "
            "+model.encoder.extra.pretrained_cfg_overlay.file=<path>, or model.encoder.pretrained=false."
        ) from error


@contextmanager
def _quick_hub(*, needed: bool) -> Iterator[None]:
    """Let the hub's client look only into its cache if the hub does not answer within 3 s.

    Left alone it tries for most of a minute.
    """
    before = hub.HF_HUB_OFFLINE
    if needed and not before:
        try:
            urllib.request.urlopen(hub.ENDPOINT, timeout=3).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _narrow_columns(net: nn.Module, name: str, own: int, wanted: int, in_channels: int) -> None:
    """Take the stride out of the width of every layer whose input is `wanted` pixels a column.

    Raises:
        UserError: not a power of two up to the ResNet's own stride, or this ResNet's layers cannot
            be changed so.
    """
    powers = [2**power for power in range(int(math.log2(own)) + 1)]
    if wanted not in powers:
        raise UserError(
            f"model.encoder.horizontal_stride={wanted} does not fit {name}, whose own is {own}. "
            f"Pass model.encoder.horizontal_stride= one of {', '.join(map(str, powers))}."
        )
    width = 8 * own
    strided: list[tuple[nn.Module, int]] = []  # and the width of its input

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        strided.append((module, inputs[0].shape[3]))

    layers = [m for m in net.modules() if _width_stride(m) == 2]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    grid = _grid(net, width, in_channels)
    for hook in hooks:
        hook.remove()
    for layer, layer_width in strided:
        if layer_width * wanted <= width:
            layer.stride = (2, 1)
            if isinstance(layer, nn.AvgPool2d):
                layer.kernel_size = (layer.kernel_size, 1)
    if _grid(net, width, in_channels) != (grid[0], width // wanted):
        raise UserError(
            f"model.encoder.horizontal_stride={wanted} cannot be had of {name}. "
            "Pass model.encoder.horizontal_stride=null, or another encoder such as resnet18."
        )


def _width_stride(module: nn.Module) -> int | None:
    stride = getattr(module, "stride", None)
    if next(module.children(), None) is not None:
        return None
    return stride[-1] if isinstance(stride, tuple) else stride


def _grid(net: nn.Module, size: int, channels: int) -> tuple[int, int]:
    """Return the feature grid of a square canvas, leaving BatchNorm's statistics as they are."""
    training = net.training
    net.eval()
    with torch.no_grad():
        (features,) = net(torch.zeros(1, channels, size, size))
    net.train(training)
    return features.shape[2], features.shape[3]
