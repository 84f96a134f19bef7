"""Triton kernels for the stem of a ResNet in training: normalise, rectify and pool in one pass each way.

The stem's maps are the largest of the network, four times those of the first stage, and torch (compiled or
not) reads and writes them for each operation. All tensors lie channels-last.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

_NONE: tl.constexpr = tl.constexpr(255)
"""Tap of a window without positive values."""


@triton.jit
@no_type_check
def _moments(
    inputs, pivot, sums, squares, TOTAL,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each program's sums of the inputs less a pivot, and of their squares."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    origin = tl.load(pivot + channels, mask=in_channels, other=0.0)[None, :]
    total = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    square = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    for start in range(program * BLOCK, TOTAL, programs * BLOCK):
        places = start + tl.arange(0, BLOCK)
        kept = (places < TOTAL)[:, None] & in_channels[None, :]
        place = places[:, None] * CHANNELS + channels[None, :]
        value = tl.load(inputs + place, mask=kept, other=0.0).to(tl.float32) - origin
        value = tl.where(kept, value, 0.0)
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
            place = ((page * HEIGHT + i) * WIDTH + j)[:, None] * CHANNELS + channels[None, :]
            value = tl.load(inputs + place, mask=inside[:, None] & in_channels[None, :], other=0.0)
            value = value.to(tl.float32) * factor + offset
            better = inside[:, None] & (value > best)
            best = tl.where(better, value, best)
            tap = tl.where(better, down * 3 + across, tap)
    place = (row * COLUMNS + xs)[:, None] * CHANNELS + channels[None, :]
    kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
    tl.store(pooled + place, best, mask=kept)
    tl.store(taps + place, tap.to(tl.uint8), mask=kept)


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
        page, y = row // ROWS, row % ROWS
        for start in range(0, COLUMNS, BLOCK):
            xs = start + tl.arange(0, BLOCK)
            kept = (xs < COLUMNS)[:, None] & in_channels[None, :]
            place = (row * COLUMNS + xs)[:, None] * CHANNELS + channels[None, :]
            tap = tl.load(taps + place, mask=kept, other=_NONE).to(tl.int32)
            some = kept & (tap != _NONE)
            slope = tl.load(gradient + place, mask=some, other=0.0).to(tl.float32)
            i, j = 2 * y + tap // 3 - 1, 2 * xs[:, None] + tap % 3 - 1
            source = ((page * HEIGHT + i) * WIDTH + j) * CHANNELS + channels[None, :]
            value = tl.load(inputs + source, mask=some, other=0.0).to(tl.float32)
            total += tl.sum(slope, axis=0)
            product += tl.sum(slope * (value - centre) * factor, axis=0)
    tl.store(sums + program * CHANNELS + channels, total, mask=in_channels)
    tl.store(products + program * CHANNELS + channels, product, mask=in_channels)


@triton.jit
@no_type_check
def _spread(
    inputs, gradient, taps, mean, rate, scale, mean_slope, mean_product, result,
    HEIGHT, WIDTH, ROWS, COLUMNS,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the inputs."""
    row = tl.program_id(0).to(tl.int64)
    page, i = row // HEIGHT, row % HEIGHT
    xs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_CHANNELS)
    in_channels = channels < CHANNELS
    slope = tl.zeros([BLOCK, BLOCK_CHANNELS], dtype=tl.float32)
    for further_down in tl.static_range(2):  # a place lies in one window, or on the edge of two
        for further_across in tl.static_range(2):
            y, x = i // 2 + further_down, xs // 2 + further_across
            down, across = i - 2 * y + 1, xs - 2 * x + 1
            inside = (y < ROWS) & (down >= 0) & (x < COLUMNS) & (across >= 0) & (xs < WIDTH)
            kept = inside[:, None] & in_channels[None, :]
            place = ((page * ROWS + y) * COLUMNS + x)[:, None] * CHANNELS + channels[None, :]
            tap = tl.load(taps + place, mask=kept, other=_NONE).to(tl.int32)
            here = kept & (tap == (down * 3 + across)[:, None])
            slope += tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    place = (row * WIDTH + xs)[:, None] * CHANNELS + channels[None, :]
    kept = (xs < WIDTH)[:, None] & in_channels[None, :]
    centre = tl.load(mean + channels, mask=in_channels, other=0.0)[None, :]
    factor = tl.load(rate + channels, mask=in_channels, other=0.0)[None, :]
    value = tl.load(inputs + place, mask=kept, other=0.0).to(tl.float32)
    normal = (value - centre) * factor
    alone = tl.load(mean_slope + channels, mask=in_channels, other=0.0)[None, :]
    along = tl.load(mean_product + channels, mask=in_channels, other=0.0)[None, :]
    gain = tl.load(scale + channels, mask=in_channels, other=0.0)[None, :]
    tl.store(result + place, gain * (slope - alone - normal * along), mask=kept)


@torch.library.custom_op("paragraph_ocr::moments", mutates_args=())
def moments(inputs: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of a channels-last "B C H W", without gradients.

    Args:
        pivot: a guess of the means; the better, the less is lost by cancellation.
    """
    channels, total = inputs.shape[1], inputs.numel() // inputs.shape[1]
    block = 64
    programs = min(2048, triton.cdiv(total, block))
    sums, squares = (pivot.new_empty(programs, channels) for _ in range(2))
    _moments[(programs,)](
        inputs, pivot, sums, squares, total,
        CHANNELS=channels, BLOCK_CHANNELS=triton.next_power_of_2(channels), BLOCK=block,
    )  # fmt: skip
    offset = sums.sum(dim=0) / total
    return pivot + offset, squares.sum(dim=0) / total - offset * offset


@moments.register_fake
def _(inputs, pivot):
    return torch.empty_like(pivot), torch.empty_like(pivot)


@torch.library.custom_op("paragraph_ocr::pooled_norm", mutates_args=())
def pooled_norm(
    inputs: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return max_pool(relu(batch_norm(inputs))) with windows of 3x3, stride 2, and the taps of the maxima.

    Args:
        inputs: "B C H W", channels-last.
        mean: of each channel, over pages and places; so `rate`, the reciprocal of the deviation.
    """
    pages, channels, height, width = inputs.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    pooled, taps = _outputs(inputs)
    scale = weight * rate
    block = 32
    _pool[(pages * rows, triton.cdiv(columns, block))](
        inputs, scale, bias - mean * scale, pooled, taps, height, width, rows, columns,
        CHANNELS=channels, BLOCK_CHANNELS=triton.next_power_of_2(channels), BLOCK=block,
    )  # fmt: skip
    return pooled, taps


@pooled_norm.register_fake
def _outputs(
    inputs: Tensor, *_: Tensor
) -> tuple[Float[Tensor, "B C h w"], UInt8[Tensor, "B C h w"]]:
    pages, channels, height, width = inputs.shape
    shape = (pages, channels, (height + 1) // 2, (width + 1) // 2)
    pooled = inputs.new_empty(shape).to(memory_format=torch.channels_last)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@torch.library.custom_op("paragraph_ocr::pooled_norm_backward", mutates_args=())
def pooled_norm_backward(
    gradient: Tensor, inputs: Tensor, taps: Tensor, weight: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, weight and bias, the statistics being those of the inputs."""
    pages, channels, height, width = inputs.shape
    rows, columns = taps.shape[2:]
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    programs, block = min(1024, pages * rows), 32
    sums, products = (mean.new_empty(programs, channels) for _ in range(2))
    sizes = (height, width, rows, columns)
    shape = {
        "CHANNELS": channels,
        "BLOCK_CHANNELS": triton.next_power_of_2(channels),
        "BLOCK": block,
    }
    _sums[(programs,)](
        inputs, gradient, taps, mean, rate, sums, products, *sizes, pages * rows, **shape
    )
    slope, product = sums.sum(dim=0), products.sum(dim=0)
    count = pages * height * width
    result = torch.empty_like(inputs)
    _spread[(pages * height, triton.cdiv(width, block))](
        inputs, gradient, taps, mean, rate, weight * rate, slope / count, product / count, result,
        *sizes, **shape,
    )  # fmt: skip
    return result, product, slope


@pooled_norm_backward.register_fake
def _(gradient, inputs, taps, weight, mean, rate):
    return torch.empty_like(inputs), torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    images, weight, _, mean, rate = inputs
    ctx.save_for_backward(images, output[1], weight, mean, rate)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient, _):
    images, taps, weight, mean, rate = ctx.saved_tensors
    found = pooled_norm_backward(gradient, images, taps, weight, mean, rate)
    return *found, None, None


pooled_norm.register_autograd(_backward, setup_context=_keep)
