"""Triton kernels for the stem of a ResNet: convolve, normalise, rectify and pool in two passes forward.

The stem's maps are the largest of the network, four times those of the first stage. torch (compiled or
not) reads and writes them for each operation, and a convolution of one channel leaves a GPU's matrix
units idle. Here the maps are written once and read three times. Maps lie channels-last.
"""

from typing import Any, no_type_check

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
"""Tap of a window without positive values."""


@triton.jit
@no_type_check
def _windows(padded, page, i, xs, within, ROWS_PADDED, COLUMNS_PADDED):
    """Return the windows "BLOCK 64" of a stretch of a row of the maps, zero beyond the row."""
    taps = tl.arange(0, _WINDOW * _WINDOW)
    row = padded + (page * ROWS_PADDED + 2 * i) * COLUMNS_PADDED
    offsets = (taps // _WINDOW) * COLUMNS_PADDED + taps % _WINDOW
    return tl.load(row + (2 * xs)[:, None] + offsets[None, :], mask=within[:, None], other=0.0)


@triton.jit
@no_type_check
def _convolve(
    padded, kernel, pivot, maps, sums, squares,
    HEIGHT, WIDTH, ROWS_PADDED, COLUMNS_PADDED, TILES, UNIT,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the maps, and each program's sums of them less a pivot, and of the squares."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    taps = tl.arange(0, _WINDOW * _WINDOW)
    weights = tl.load(
        kernel + taps[:, None] * CHANNELS + channels[None, :], mask=in_channels[None, :], other=0.0
    )
    origin = tl.load(pivot + channels, mask=in_channels, other=0.0)[None, :]
    total = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    square = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    across = tl.cdiv(WIDTH, BLOCK)
    for tile in range(program, TILES, programs):
        row = (tile // across).to(tl.int64)  # of all pages one under the other
        xs = (tile % across) * BLOCK + tl.arange(0, BLOCK)
        within = xs < WIDTH
        windows = _windows(
            padded, row // HEIGHT, row % HEIGHT, xs, within, ROWS_PADDED, COLUMNS_PADDED
        )
        result = tl.dot(windows, weights, input_precision=PRECISION) * UNIT
        result = result.to(maps.dtype.element_ty)
        kept = within[:, None] & in_channels[None, :]
        tl.store(
            maps + (row * WIDTH + xs)[:, None] * CHANNELS + channels[None, :], result, mask=kept
        )
        value = tl.where(kept, result.to(tl.float32) - origin, 0.0)
        total += value
        square += value * value
    tl.store(sums + program * CHANNELS + channels, tl.sum(total, axis=0), mask=in_channels)
    tl.store(squares + program * CHANNELS + channels, tl.sum(square, axis=0), mask=in_channels)


@triton.jit
@no_type_check
def _pool(
    inputs, scale, shift, pooled, taps,
    HEIGHT, WIDTH, ROWS, COLUMNS,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the maximum of each 3x3 window of relu(scale * inputs + shift), and which tap has it."""
    row = tl.program_id(0).to(tl.int64)  # of all pages one under the other
    page, y = row // ROWS, row % ROWS
    xs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    factor = tl.load(scale + channels, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channels, mask=in_channels, other=0.0)[None, :]
    best = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    tap = tl.full([BLOCK, BLOCK_CHANNELS], _NONE, dtype=tl.int32)
    for down in tl.static_range(3):
        for across in tl.static_range(3):
            i, j = 2 * y + down - 1, 2 * xs + across - 1
            inside = (i >= 0) & (i < HEIGHT) & (j >= 0) & (j < WIDTH) & (xs < COLUMNS)
            source = inputs + (page * HEIGHT + i) * WIDTH * CHANNELS
            place = j[:, None] * CHANNELS + channels[None, :]
            value = tl.load(source + place, mask=inside[:, None] & in_channels[None, :], other=0.0)
            value = value.to(tl.float32) * factor + offset
            better = inside[:, None] & (value > best)
            best = tl.where(better, value, best)
            tap = tl.where(better, down * 3 + across, tap)
    place = xs[:, None] * CHANNELS + channels[None, :]
    kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
    first = row * COLUMNS * CHANNELS
    tl.store(pooled + first + place, best, mask=kept)
    tl.store(taps + first + place, tap.to(tl.uint8), mask=kept)


@triton.jit
@no_type_check
def _sums(
    inputs, gradient, taps, mean, rate, sums, products,
    HEIGHT, WIDTH, ROWS, COLUMNS, TOTAL,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each program's sums of the gradient at the normalised values, alone and times them."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    centre = tl.load(mean + channels, mask=in_channels, other=0.0)[None, :]
    factor = tl.load(rate + channels, mask=in_channels, other=0.0)[None, :]
    total = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    product = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    for row in range(program, TOTAL, programs):
        page, y = row // ROWS, (row % ROWS).to(tl.int32)
        first, source = row * COLUMNS * CHANNELS, inputs + page * HEIGHT * WIDTH * CHANNELS
        for start in range(0, COLUMNS, BLOCK):
            xs = start + tl.arange(0, BLOCK)
            kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
            place = xs[:, None] * CHANNELS + channels[None, :]
            tap = tl.load(taps + first + place, mask=kept, other=_NONE).to(tl.int32)
            some = kept & (tap != _NONE)
            slope = tl.load(gradient + first + place, mask=some, other=0.0).to(tl.float32)
            i, j = 2 * y + tap // 3 - 1, 2 * xs[:, None] + tap % 3 - 1
            peak = (i * WIDTH + j) * CHANNELS + channels[None, :]
            value = tl.load(source + peak, mask=some, other=0.0).to(tl.float32)
            total += tl.sum(slope, axis=0)
            product += tl.sum(slope * (value - centre) * factor, axis=0)
    tl.store(sums + program * CHANNELS + channels, total, mask=in_channels)
    tl.store(products + program * CHANNELS + channels, product, mask=in_channels)


@triton.jit
@no_type_check
def _weigh(
    inputs, gradient, taps, padded, mean, rate, scale, mean_slope, mean_product, result,
    HEIGHT, WIDTH, ROWS, COLUMNS, ROWS_PADDED, COLUMNS_PADDED, TILES,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write each program's part of the gradient of the convolution's weights.

    The gradient of the maps is computed on the way, and written nowhere.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    centre = tl.load(mean + channels, mask=in_channels, other=0.0)[None, :]
    factor = tl.load(rate + channels, mask=in_channels, other=0.0)[None, :]
    alone = tl.load(mean_slope + channels, mask=in_channels, other=0.0)[None, :]
    along = tl.load(mean_product + channels, mask=in_channels, other=0.0)[None, :]
    gain = tl.load(scale + channels, mask=in_channels, other=0.0)[None, :]
    total = tl.zeros([_WINDOW * _WINDOW, BLOCK_CHANNELS], dtype=tl.float32)
    segments = tl.cdiv(WIDTH, BLOCK)
    for tile in range(program, TILES, programs):
        row = (tile // segments).to(tl.int64)
        xs = (tile % segments) * BLOCK + tl.arange(0, BLOCK)
        within = xs < WIDTH
        page, i = row // HEIGHT, row % HEIGHT
        slope = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
        for further_down in tl.static_range(2):  # a place lies in one window, or on the edge of two
            for further_across in tl.static_range(2):
                y, x = i // 2 + further_down, xs // 2 + further_across
                down, across = i - 2 * y + 1, xs - 2 * x + 1
                inside = (y < ROWS) & (down >= 0) & (x < COLUMNS) & (across >= 0) & within
                kept = inside[:, None] & in_channels[None, :]
                first = (page * ROWS + y) * COLUMNS * CHANNELS
                place = x[:, None] * CHANNELS + channels[None, :]
                tap = tl.load(taps + first + place, mask=kept, other=_NONE).to(tl.int32)
                here = kept & (tap == (down * 3 + across)[:, None])
                slope += tl.load(gradient + first + place, mask=here, other=0.0).to(tl.float32)
        kept = within[:, None] & in_channels[None, :]
        place = xs[:, None] * CHANNELS + channels[None, :]
        value = tl.load(inputs + row * WIDTH * CHANNELS + place, mask=kept, other=0.0)
        value = value.to(tl.float32)
        normal = (value - centre) * factor
        slope = tl.where(kept, gain * (slope - alone - normal * along), 0.0)
        windows = _windows(padded, page, i, xs, within, ROWS_PADDED, COLUMNS_PADDED)
        total += tl.dot(tl.trans(windows), slope.to(windows.dtype), input_precision=PRECISION)
    cells = tl.arange(0, _WINDOW * _WINDOW)
    place = (program * _WINDOW * _WINDOW + cells[:, None]) * CHANNELS + channels[None, :]
    tl.store(result + place, total, mask=in_channels[None, :])


def _shape(channels: int, block: int) -> dict[str, int]:
    # 16 is the least that a product takes
    wide = max(16, triton.next_power_of_2(channels))
    return {"CHANNELS": channels, "BLOCK_CHANNELS": wide, "BLOCK": block}


def _on_maps(padded: Tensor, height: int, width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return what the kernels that see windows are told of maps of this size."""
    tiles = len(padded) * height * triton.cdiv(width, _BLOCK)
    precision = "ieee" if padded.dtype == torch.float32 else "tf32"
    return (*padded.shape[1:], tiles), {"PRECISION": precision}


_BLOCK = 64
"""Places of a row of the maps that a program has in hand at a time."""

_PROGRAMS = 1056
"""Programs of the kernels that add up: a small multiple of an H100's 132 multiprocessors."""


def _convolved(
    padded: Tensor, kernel: Tensor, pivot: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps "B C h w", and mean and variance of each channel."""
    channels = kernel.shape[1]
    maps = _empty_maps(padded, channels, height, width)
    sizes, precision = _on_maps(padded, height, width)
    programs = min(_PROGRAMS, sizes[-1])
    sums, squares = (pivot.new_empty(programs, channels) for _ in range(2))
    _convolve[(programs,)](
        padded, kernel.to(padded.dtype).contiguous(), pivot, maps, sums, squares,
        height, width, *sizes, UNIT,
        **_shape(channels, _BLOCK), **precision,
    )  # fmt: skip
    count = maps.numel() // channels
    offset = sums.sum(dim=0) / count
    return maps, pivot + offset, squares.sum(dim=0) / count - offset * offset


def _pooled(maps: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return max_pool(relu(scale * maps + shift)), and the taps of the maxima."""
    pages, channels, height, width = maps.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    pooled = _empty_maps(maps, channels, rows, columns)
    taps = torch.empty_like(pooled, dtype=torch.uint8)
    block = 32
    _pool[(pages * rows, triton.cdiv(columns, block))](
        maps, scale, shift, pooled, taps, height, width, rows, columns, **_shape(channels, block)
    )
    return pooled, taps


def _empty_maps(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (len(like), channels, height, width)
    return like.new_empty(shape).to(memory_format=torch.channels_last)


@torch.library.custom_op("paragraph_ocr::stem_in_evaluation", mutates_args=())
def stem_in_evaluation(
    padded: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, height: int, width: int
) -> Tensor:
    """Return max_pool(relu(scale * convolution + shift)) "B C h w", windows of 3x3 and stride 2.

    Args:
        padded: pages "B H W" with 4 px before, and behind so many that every window lies within.
        kernel: "64 C"; rounded to the precision of the pages.
        height: of the convolution's maps; so `width`.
    """
    maps, _, _ = _convolved(padded, kernel, torch.zeros_like(scale), height, width)
    return _pooled(maps, scale, shift)[0]


@stem_in_evaluation.register_fake
def _(padded, kernel, scale, shift, height, width):
    return _empty_maps(padded, kernel.shape[1], (height + 1) // 2, (width + 1) // 2)


@torch.library.custom_op("paragraph_ocr::stem_in_training", mutates_args=())
def stem_in_training(
    padded: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, pivot: Tensor,
    height: int, width: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return max_pool(relu(batch_norm(convolution))), mean and variance of the maps, and what backward needs.

    Gradients are those of kernel, weight and bias alone.

    Args:
        pivot: a guess of the means; the better, the less is lost by cancellation.
        Others as in `stem_in_evaluation`.

    Returns:
        Pooled maps; mean and variance of each channel; the maps; the taps of the maxima.
    """
    maps, mean, variance = _convolved(padded, kernel, pivot, height, width)
    scale = weight * torch.rsqrt(variance + eps)
    pooled, taps = _pooled(maps, scale, bias - mean * scale)
    return pooled, mean, variance, maps, taps


@stem_in_training.register_fake
def _(padded, kernel, weight, bias, pivot, height, width, eps):
    channels = kernel.shape[1]
    pooled = _empty_maps(padded, channels, (height + 1) // 2, (width + 1) // 2)
    taps = torch.empty_like(pooled, dtype=torch.uint8)
    maps = _empty_maps(padded, channels, height, width)
    return pooled, torch.empty_like(pivot), torch.empty_like(pivot), maps, taps


@torch.library.custom_op("paragraph_ocr::stem_backward", mutates_args=())
def stem_backward(
    gradient: Tensor, maps: Tensor, taps: Tensor, padded: Tensor,
    weight: Tensor, mean: Tensor, variance: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of kernel, weight and bias, the statistics being those of the maps."""
    pages, channels, height, width = maps.shape
    rows, columns = taps.shape[2:]
    rate = torch.rsqrt(variance + eps)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    programs = min(1024, pages * rows)
    sums, products = (mean.new_empty(programs, channels) for _ in range(2))
    _sums[(programs,)](
        maps, gradient, taps, mean, rate, sums, products,
        height, width, rows, columns, pages * rows, **_shape(channels, 32),
    )  # fmt: skip
    slope, product = sums.sum(dim=0), products.sum(dim=0)
    count = pages * height * width
    sizes, precision = _on_maps(padded, height, width)
    programs = min(_PROGRAMS, sizes[-1])
    parts = mean.new_empty(programs, WINDOW * WINDOW, channels)
    _weigh[(programs,)](
        maps, gradient, taps, padded, mean, rate, weight * rate, slope / count, product / count, parts,
        height, width, rows, columns, *sizes, **_shape(channels, _BLOCK), **precision,
    )  # fmt: skip
    return parts.sum(dim=0) * UNIT, product, slope


@stem_backward.register_fake
def _(gradient, maps, taps, padded, weight, mean, variance, eps):
    kernel = mean.new_empty(WINDOW * WINDOW, maps.shape[1])
    return kernel, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    padded, _, weight, _, _, _, _, eps = inputs
    _, mean, variance, maps, taps = output
    ctx.save_for_backward(maps, taps, padded, weight, mean, variance)
    ctx.eps = eps
    ctx.mark_non_differentiable(mean, variance, maps, taps)


def _backward(ctx, gradient, *_):
    return None, *stem_backward(gradient, *ctx.saved_tensors, ctx.eps), None, None, None, None


stem_in_training.register_autograd(_backward, setup_context=_keep)
