"""Triton kernels for the stem of a ResNet: convolution, batch norm, ReLU and pooling without their maps.

The maps of the convolution are the largest of the network, and torch (compiled or not) writes and reads
them for each operation. Here they are computed where they are pooled, and never written. What batch norm
needs of them follows from the 64 pixels below each window: with A the windows of all N places "N 64" and
K the weights "64 C", the maps are A K, so that

    their means are     1'A K / N,
    their variances     diag(K' V K) / N   with V = A'A - A'1 1'A / N,

and the gradient of K needs of A no more than V and A'S, where S holds the gradient of each maximum at its
place. Both are products over all places, which a GPU's matrix units compute as fast as they are fed.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = 1 / 255
"""A page's ink of one, in units of its pixels: whole numbers, which bfloat16 holds exactly."""

WINDOW = 8
"""Side of the convolution's window in the padded page: 7, and before it one that weighs nothing."""

_WINDOW: tl.constexpr = tl.constexpr(WINDOW)

_NONE: tl.constexpr = tl.constexpr(255)
"""Tap of a window of pooling without positive values."""


@triton.jit
@no_type_check
def _windows(padded, page, i, xs, within, ROWS_PADDED, COLUMNS_PADDED):
    """Return the windows "BLOCK 64" of places of a row of the maps, zero where these are not within."""
    cells = tl.arange(0, _WINDOW * _WINDOW)
    row = padded + (page * ROWS_PADDED + 2 * i) * COLUMNS_PADDED
    offsets = (cells // _WINDOW) * COLUMNS_PADDED + cells % _WINDOW
    return tl.load(row + (2 * xs)[:, None] + offsets[None, :], mask=within[:, None], other=0.0)


@triton.jit
@no_type_check
def _moments(
    padded, sums, products,
    HEIGHT, WIDTH, ROWS_PADDED, COLUMNS_PADDED, TILES,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write each program's part of A'1 and of A'A."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    cells = tl.arange(0, _WINDOW * _WINDOW)
    total = tl.zeros([BLOCK, _WINDOW * _WINDOW], dtype=tl.float32)
    product = tl.zeros([_WINDOW * _WINDOW, _WINDOW * _WINDOW], dtype=tl.float32)
    segments = tl.cdiv(WIDTH, BLOCK)
    for tile in range(program, TILES, programs):
        row = (tile // segments).to(tl.int64)  # of all pages one under the other
        xs = (tile % segments) * BLOCK + tl.arange(0, BLOCK)
        windows = _windows(
            padded, row // HEIGHT, row % HEIGHT, xs, xs < WIDTH, ROWS_PADDED, COLUMNS_PADDED
        )
        total += windows.to(tl.float32)
        product += tl.dot(tl.trans(windows), windows, input_precision=PRECISION)
    first = program * _WINDOW * _WINDOW
    tl.store(sums + first + cells, tl.sum(total, axis=0))
    place = (first + cells[:, None]) * _WINDOW * _WINDOW + cells[None, :]
    tl.store(products + place, product)


@triton.jit
@no_type_check
def _pool(
    padded, kernel, scale, shift, pooled, taps,
    HEIGHT, WIDTH, ROWS, COLUMNS, ROWS_PADDED, COLUMNS_PADDED,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the maximum of each 3x3 window of relu(scale * A K + shift), and which tap has it."""
    row = tl.program_id(0).to(tl.int64)
    page, y = row // ROWS, row % ROWS
    xs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    cells = tl.arange(0, _WINDOW * _WINDOW)
    weights = tl.load(
        kernel + cells[:, None] * CHANNELS + channels[None, :], mask=in_channels[None, :], other=0.0
    )
    factor = tl.load(scale + channels, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channels, mask=in_channels, other=0.0)[None, :]
    best = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    tap = tl.full([BLOCK, BLOCK_CHANNELS], _NONE, dtype=tl.int32)
    for place in range(9):
        i, j = 2 * y + place // 3 - 1, 2 * xs + place % 3 - 1
        inside = (i >= 0) & (i < HEIGHT) & (j >= 0) & (j < WIDTH) & (xs < COLUMNS)
        windows = _windows(padded, page, i, j, inside, ROWS_PADDED, COLUMNS_PADDED)
        value = tl.dot(windows, weights, input_precision=PRECISION) * factor + offset
        better = inside[:, None] & (value > best)
        best = tl.where(better, value, best)
        tap = tl.where(better, place, tap)
    target = xs[:, None] * CHANNELS + channels[None, :]
    kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
    first = row * COLUMNS * CHANNELS
    tl.store(pooled + first + target, best, mask=kept)
    tl.store(taps + first + target, tap.to(tl.uint8), mask=kept)


@triton.jit
@no_type_check
def _spread(
    gradient, taps, padded, sums, products,
    HEIGHT, WIDTH, ROWS, COLUMNS, ROWS_PADDED, COLUMNS_PADDED, TILES,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write each program's part of 1'S and of A'S."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    cells = tl.arange(0, _WINDOW * _WINDOW)
    total = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    product = tl.zeros([_WINDOW * _WINDOW, BLOCK_CHANNELS], dtype=tl.float32)
    segments = tl.cdiv(COLUMNS, BLOCK)
    for tile in range(program, TILES, programs):
        row = (tile // segments).to(tl.int64)
        page, y = row // ROWS, row % ROWS
        xs = (tile % segments) * BLOCK + tl.arange(0, BLOCK)
        kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
        first, target = row * COLUMNS * CHANNELS, xs[:, None] * CHANNELS + channels[None, :]
        tap = tl.load(taps + first + target, mask=kept, other=_NONE).to(tl.int32)
        slope = tl.load(gradient + first + target, mask=kept, other=0.0)
        total += tl.where(tap != _NONE, slope.to(tl.float32), 0.0)
        for place in range(9):
            i, j = 2 * y + place // 3 - 1, 2 * xs + place % 3 - 1
            inside = (i >= 0) & (i < HEIGHT) & (j >= 0) & (j < WIDTH) & (xs < COLUMNS)
            windows = _windows(padded, page, i, j, inside, ROWS_PADDED, COLUMNS_PADDED)
            here = tl.where(tap == place, slope, 0.0).to(windows.dtype)
            product += tl.dot(tl.trans(windows), here, input_precision=PRECISION)
    tl.store(sums + program * CHANNELS + channels, tl.sum(total, axis=0), mask=in_channels)
    place = (program * _WINDOW * _WINDOW + cells[:, None]) * CHANNELS + channels[None, :]
    tl.store(products + place, product, mask=in_channels[None, :])


_BLOCK = 64
"""Places of a row that a program has in hand at a time."""

_PROGRAMS = 528
"""Programs of the kernels that add up: a small multiple of an H100's 132 multiprocessors."""


def _blocks(padded: Tensor, channels: int) -> dict[str, object]:
    # 16 is the least that a product takes
    return {
        "CHANNELS": channels,
        "BLOCK_CHANNELS": max(16, triton.next_power_of_2(channels)),
        **_block(padded),
    }


def _block(padded: Tensor) -> dict[str, object]:
    precise = padded.dtype == torch.float32  # which leaves no registers to load ahead
    return {
        "BLOCK": _BLOCK,
        "PRECISION": "ieee" if precise else "tf32",
        "num_warps": 4,
        "num_stages": 1 if precise else 2,
    }


def _pooled(
    padded: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return max_pool(relu(scale * A K + shift)), and the taps of the maxima."""
    pooled, taps = _empty_maps(padded, kernel, height, width)
    channels, rows, columns = pooled.shape[1:]
    _pool[(len(padded) * rows, triton.cdiv(columns, _BLOCK))](
        padded, kernel, scale, shift, pooled, taps,
        height, width, rows, columns, *padded.shape[1:], **_blocks(padded, channels),
    )  # fmt: skip
    return pooled, taps


def _empty_maps(padded: Tensor, kernel: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    shape = (len(padded), kernel.shape[1], (height + 1) // 2, (width + 1) // 2)
    pooled = padded.new_empty(shape).to(memory_format=torch.channels_last)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@torch.library.custom_op("paragraph_ocr::stem_in_evaluation", mutates_args=())
def stem_in_evaluation(
    padded: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, height: int, width: int
) -> Tensor:
    """Return max_pool(relu(scale * convolution + shift)) "B C h w", windows of 3x3 and stride 2.

    Args:
        padded: pages "B H W" with 4 px before, and behind so many that every window lies within.
        kernel: "64 C"; rounded to the precision of the pages.
        height: of the convolution's maps, which are not returned; so `width`.
    """
    return _pooled(
        padded, kernel.to(padded.dtype).contiguous(), scale * UNIT, shift, height, width
    )[0]


@stem_in_evaluation.register_fake
def _(padded, kernel, scale, shift, height, width):
    return _empty_maps(padded, kernel, height, width)[0]


@torch.library.custom_op("paragraph_ocr::stem_in_training", mutates_args=())
def stem_in_training(
    padded: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return max_pool(relu(batch_norm(convolution))), and what backward needs.

    Gradients are those of kernel, weight and bias alone. Arguments as in `stem_in_evaluation`.

    Returns:
        Pooled maps; mean and variance of each channel of the convolution; the taps of the maxima; A'1
        and V, in the maps' units.
    """
    kernel = kernel.to(padded.dtype).contiguous()
    tiles = len(padded) * height * triton.cdiv(width, _BLOCK)
    programs = min(_PROGRAMS, tiles)
    sums = weight.new_empty(programs, WINDOW**2)
    products = weight.new_empty(programs, WINDOW**2, WINDOW**2)
    _moments[(programs,)](
        padded, sums, products, height, width, *padded.shape[1:], tiles, **_block(padded)
    )
    # in double precision, where large sums are taken from each other
    count, weights = len(padded) * height * width, kernel.double()
    total = sums.sum(dim=0, dtype=torch.float64) * UNIT
    spread = products.sum(dim=0, dtype=torch.float64) * UNIT**2 - torch.outer(total, total) / count
    mean = (total @ weights / count).to(weight.dtype)
    variance = ((weights * (spread @ weights)).sum(dim=0) / count).clamp(min=0).to(weight.dtype)
    scale = weight * torch.rsqrt(variance + eps)
    shift = bias - mean * scale
    pooled, taps = _pooled(padded, kernel, scale * UNIT, shift, height, width)
    return pooled, mean, variance, taps, total, spread


@stem_in_training.register_fake
def _(padded, kernel, weight, bias, height, width, eps):
    pooled, taps = _empty_maps(padded, kernel, height, width)
    total = weight.new_empty(WINDOW**2, dtype=torch.float64)
    spread = weight.new_empty(WINDOW**2, WINDOW**2, dtype=torch.float64)
    return pooled, torch.empty_like(weight), torch.empty_like(weight), taps, total, spread


@torch.library.custom_op("paragraph_ocr::stem_backward", mutates_args=())
def stem_backward(
    gradient: Tensor, taps: Tensor, padded: Tensor, kernel: Tensor, weight: Tensor,
    variance: Tensor, total: Tensor, spread: Tensor, height: int, width: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of kernel, weight and bias."""
    pages, channels, rows, columns = taps.shape
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    tiles = pages * rows * triton.cdiv(columns, _BLOCK)
    programs = min(_PROGRAMS, tiles)
    sums = weight.new_empty(programs, channels)
    products = weight.new_empty(programs, WINDOW**2, channels)
    _spread[(programs,)](
        gradient, taps, padded, sums, products,
        height, width, rows, columns, *padded.shape[1:], tiles, **_blocks(padded, channels),
    )  # fmt: skip
    count, weights = pages * height * width, kernel.to(padded.dtype).double()
    slopes = sums.sum(dim=0, dtype=torch.float64)
    products = products.sum(dim=0, dtype=torch.float64) * UNIT
    products = products - torch.outer(total, slopes) / count
    rate = torch.rsqrt(variance.double() + eps)
    along = rate * (weights * products).sum(dim=0)  # the gradient of batch norm's weight
    slope = weight * rate * (products - rate * along / count * (spread @ weights))
    return slope.to(kernel.dtype).contiguous(), along.to(weight.dtype), slopes.to(weight.dtype)


@stem_backward.register_fake
def _(gradient, taps, padded, kernel, weight, variance, total, spread, height, width, eps):
    slope = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    return slope, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    padded, kernel, weight, _, *ctx.others = inputs
    _, mean, variance, taps, total, spread = output
    ctx.save_for_backward(taps, padded, kernel, weight, variance, total, spread)
    ctx.mark_non_differentiable(mean, variance, taps, total, spread)


def _backward(ctx, gradient, *_):
    return None, *stem_backward(gradient, *ctx.saved_tensors, *ctx.others), None, None, None


stem_in_training.register_autograd(_backward, setup_context=_keep)
