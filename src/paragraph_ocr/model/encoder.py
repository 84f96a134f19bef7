"""The encoder: any of timm's ResNets, cut at a stage, with columns as narrow as wanted."""

import functools
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call

from paragraph_ocr.errors import UserError, nearest
from paragraph_ocr.model.stem import Stem


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


def synchronise_batch_norms(module: nn.Module) -> nn.Module:
    """Return the module with every BatchNorm taking its statistics over all processes, on GPUs.

    Parameters and their names stay. torch's own conversion loses the activation that timm keeps in some
    of its BatchNorms.
    """
    return timm.layers.convert_sync_batchnorm(module)


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
    to the features in evaluation. It is not where the whole page is pooled or normalised (the sk,
    legacy_se, GroupNorm, bit and frn families), and at true sizes that are no multiples of the stride
    not where max-pooling follows no ReLU (resnetv2, cspresnet), where blurring reflects the edge, or
    where halving rounds down (clip, mlp, aa, lambda, tresnet, inception_resnet_v2).

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
            _narrow_columns(self.net, name, in_channels, own, horizontal_stride)
        for parameter in self.net.parameters():
            if parameter.dim() == 4:  # lambda ResNets have three-dimensional kernels too
                parameter.data = _channels_last(parameter.data)  # mixed precision computes so
        self.requires_grad_(not freeze)
        self.train()
        self._padding: _Padding | None = None  # of the batch at hand
        self._stem = Stem(self.net) if stage > 0 and Stem.fits(self.net) else None
        for layer in self.net.modules():
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                if layer.kernel_size not in (1, (1, 1)):  # those mix no cells
                    layer.register_forward_pre_hook(self._blank_padding)
                if isinstance(layer, nn.AvgPool2d):
                    layer.register_forward_hook(self._average_inside)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(mode and not self.frozen)

    def check_canvas(self, height: int, width: int) -> None:
        """Check, without computing anything, that the ResNet takes pages of this size.

        Raises:
            UserError: it takes but one size, as hybrids with position tables do.
        """
        try:
            _trace(self.net, self.in_channels, height, width)
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
        if self._stem is not None and self._stem.serves and sizes is None and images.is_cuda:
            features = self._stem(images)
            for layer in [*self.net.children()][Stem.NUM_LAYERS :]:
                features = layer(features)
            return features
        pages = images.to(torch.float32) / 255
        if self.in_channels == 3:
            pages = pages.expand(-1, 3, -1, -1)
        if sizes is not None:
            # whole cells at every level, so that a layer's stride is canvas over input
            spare = [
                -side % stride for side, stride in zip(pages.shape[2:], self.stride, strict=True)
            ]
            pages = F.pad(pages, (0, spare[1], 0, spare[0]))
            self._padding = _Padding(sizes, pages.shape[2], pages.shape[3])
        (features,) = self.net(_channels_last(pages))
        self._padding = None
        return features

    def cells(self, sizes: Int[Tensor, "B 2"], grid: tuple[int, int]) -> Bool[Tensor, "B 1 h w"]:
        """Return a mask of the cells that lie on the true page."""
        return _Padding(sizes, grid[0] * self.stride[0], grid[1] * self.stride[1]).inside(*grid)

    def _blank_padding(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Zero what lies beyond the true page, as a convolution's own padding would be."""
        height, width = inputs[0].shape[2:]
        if self._padding is None or (height, width) == (1, 1):  # inside an attention block
            return None
        return (inputs[0] * self._padding.inside(height, width), *inputs[1:])

    def _average_inside(
        self, pool: nn.AvgPool2d, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Make the averages those of the cells on the true page alone."""
        if self._padding is None:
            return output
        inside = self._padding.inside(inputs[0].shape[2], inputs[0].shape[3]).to(output.dtype)
        share = F.avg_pool2d(
            inside,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
        )
        return output / share.clamp(min=1e-6)  # beyond the page both are zero


def _channels_last(tensor: Tensor) -> Tensor:
    """Return a copy that lies so by its strides: `contiguous` takes one of a single channel as it is."""
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


class _Padding:
    """Which cells lie on the true pages of a batch, at each level of the ResNet."""

    def __init__(self, sizes: Int[Tensor, "B 2"], height: int, width: int) -> None:
        self._sizes, self._height, self._width = sizes, height, width
        self._masks: dict[tuple[int, int], Tensor] = {}

    def inside(self, rows: int, columns: int) -> Bool[Tensor, "B 1 rows columns"]:
        if (rows, columns) not in self._masks:
            device = self._sizes.device
            tops = torch.arange(rows, device=device) * (self._height // rows)
            lefts = torch.arange(columns, device=device) * (self._width // columns)
            vertical, horizontal = tops < self._sizes[:, :1], lefts < self._sizes[:, 1:]
            self._masks[rows, columns] = (vertical[:, :, None] & horizontal[:, None, :])[:, None]
        return self._masks[rows, columns]


def _build(
    name: str, stage: int, in_channels: int, pretrained: bool, extra: dict[str, Any]
) -> nn.Module:
    if "checkpoint_path" in extra:
        raise UserError(
            "model.encoder.extra.checkpoint_path is not read. Pass model.encoder.pretrained=true with "
            "+model.encoder.extra.pretrained_cfg_overlay.file=<path>."
        )
    file = dict(extra.get("pretrained_cfg_overlay", {})).get("file")
    if pretrained and file is not None and not Path(file).is_file():
        raise UserError(
            f"model.encoder.extra.pretrained_cfg_overlay.file={file} does not exist. "
            "Pass the path of a weights file."
        )
    try:
        if stage < 0:
            raise IndexError
        with _quick_hub(needed=pretrained and file is None):
            return timm.create_model(
                name,
                pretrained=pretrained,
                features_only=True,
                out_indices=(stage,),
                in_chans=in_channels,
                **extra,
            )
    except (AssertionError, IndexError) as error:
        stages = ", ".join(map(str, _stages(name)))
        raise UserError(
            f"model.encoder.stage={stage} is not a stage of {name}. "
            f"Pass model.encoder.stage= one of {stages}."
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.encoder.extra={extra} does not suit {name}: {error}. "
            "Pass only arguments of timm's constructor."
        ) from error
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"model.encoder.pretrained=true: the weights of {name} cannot be had ({reason[0]}). "
            "Connect to the network, or pass a local file of this ResNet with "
            "+model.encoder.extra.pretrained_cfg_overlay.file=<path>, or model.encoder.pretrained=false."
        ) from error


def _stages(name: str) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(timm.create_model(name, features_only=True).feature_info.out_indices)  # type: ignore[arg-type]


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


def _narrow_columns(net: nn.Module, name: str, in_channels: int, own: int, wanted: int) -> None:
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
    side = 8 * own
    strided: list[tuple[nn.Module, int]] = []  # and the width of its input

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        strided.append((layer, inputs[0].shape[3]))

    layers = [layer for layer in net.modules() if _width_stride(layer) == 2]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        rows, _ = _trace(net, in_channels, side, side)
        for layer, width in strided:
            if width * wanted <= side:
                layer.stride = (2, 1)  # type: ignore[assignment]
                if isinstance(layer, nn.AvgPool2d):
                    layer.kernel_size = (layer.kernel_size, 1)  # type: ignore[assignment]
        narrowed = _trace(net, in_channels, side, side) == (rows, side // wanted)
    except RuntimeError:  # shapes that no longer fit, or a ResNet for one size of page
        narrowed = False
    finally:
        for hook in hooks:
            hook.remove()
    if not narrowed:
        raise UserError(
            f"model.encoder.horizontal_stride={wanted} cannot be had of {name}. "
            "Pass model.encoder.horizontal_stride=null, or another encoder such as resnet18."
        )


def _width_stride(module: nn.Module) -> int | None:
    stride = getattr(module, "stride", None)
    if next(module.children(), None) is not None:
        return None
    return stride[-1] if isinstance(stride, tuple) else stride


def _trace(net: nn.Module, in_channels: int, height: int, width: int) -> tuple[int, int]:
    """Return the feature grid of a canvas; shapes alone pass through, nothing is computed."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    # two pages: BatchNorm in training refuses the single value of a pooled page
    canvas = torch.empty(2, in_channels, height, width, device="meta")
    with torch.no_grad():
        (features,) = functional_call(net, shapes, (canvas,))
    return features.shape[2], features.shape[3]
