"""Greedy reading on a CPU: all steps of a page in one compiled function, a thread for each page.

A step of one page is products of matrices and a vector, which wait for their weights to come from the CPU's
last cache or from memory: under autocast to bfloat16 half as long. All sums are in float32. Written with
PyTorch's operations a step would be ninety of them, each to be found, and threads would meet in each; here a
thread waits for no other before its page has ended. Numba compiles the functions at the first reading on a
machine, in some seconds, and keeps them.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, cast, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int, Shaped
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor, nn

from paragraph_ocr.model.decoder import Decoder, Layer

_LN_2 = np.float32(math.log(2.0))
_LEAST = np.float32(-87.0)
"""Whose exponential is nearly the least that a float holds with all its digits."""
_EXPONENT_OF_1, _BITS_OF_FRACTION = np.int32(127), np.int32(23)  # of a float


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function by Numba. Sums are taken in any order, so that they are vectorised."""
    by_numba = partial(njit, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
    try:
        return by_numba(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return by_numba()(function)


class _Weights(NamedTuple):
    """A decoder's weights, those of its layers stacked, each matrix with its bias.

    Matrices, but for the embedding, are float32 or the bits of bfloat16.
    """

    embedding: Float32[np.ndarray, "V D"]
    """Times sqrt(D)."""
    positions: Float32[np.ndarray, "T D"]
    own: Shaped[np.ndarray, "layers 3*D D"]
    """To queries, keys and values."""
    own_bias: Float32[np.ndarray, "layers 3*D"]
    own_out: Shaped[np.ndarray, "layers D D"]
    own_out_bias: Float32[np.ndarray, "layers D"]
    cross: Shaped[np.ndarray, "layers D D"]
    """To queries."""
    cross_bias: Float32[np.ndarray, "layers D"]
    cross_out: Shaped[np.ndarray, "layers D D"]
    cross_out_bias: Float32[np.ndarray, "layers D"]
    expand: Shaped[np.ndarray, "layers hidden D"]
    expand_bias: Float32[np.ndarray, "layers hidden"]
    contract: Shaped[np.ndarray, "layers D hidden"]
    contract_bias: Float32[np.ndarray, "layers D"]
    read_out: Shaped[np.ndarray, "V D"]
    read_out_bias: Float32[np.ndarray, " V"]
    norms: Float32[np.ndarray, "layers 3 2 D"]
    """Scale and shift of each block's."""
    last_norm: Float32[np.ndarray, "2 D"]
    """Used where norms stand before their blocks."""


def read_greedily(
    decoder: Decoder,
    memory: Float[Tensor, "B M D"],
    memory_mask: Bool[Tensor, "B M"] | None,
    *,
    start: int,
    end: int | None,
    pad: int,
    max_length: int,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Return the likeliest token of each of max_length - 1 steps, and its log-probability.

    Args:
        end: the token that ends a row; None goes on to the maximum length whatever is written.
        pad: what is written after the end.
    """
    count, layers = len(memory), cast(list[Layer], list(decoder.layers))
    written = torch.full((count, max_length - 1), pad)
    scores = torch.zeros(count, max_length - 1)
    heads, pre = layers[0].self_attention.heads, layers[0].pre
    epsilon = cast(nn.LayerNorm, layers[0].norms[0]).eps
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    stored = torch.bfloat16 if half else torch.float32
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        weights = _stacked(decoder, layers, stored)

        def steps_of(page: int) -> Callable[[], None]:
            cells = memory[page] if memory_mask is None else memory[page, memory_mask[page]]
            keys, values = _projected(layers, cells.to(stored))
            into = written[page].numpy(), scores[page].numpy()
            ends = start, -1 if end is None else end
            return partial(_read_page, weights, heads, pre, epsilon, keys, values, *ends, *into)

        if count == 1:
            steps_of(0)()
            return written, scores
        threads = torch.get_num_threads()
        pool, going = ThreadPoolExecutor(threads), deque[Future[None]]()
        try:
            for page in range(count):
                if len(going) == 2 * threads:  # no more of them hold keys and values
                    going.popleft().result()
                going.append(pool.submit(steps_of(page)))
            for reading in going:
                reading.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return written, scores


def _stacked(decoder: Decoder, layers: list[Layer], stored: torch.dtype) -> _Weights:
    """Return the weights as they are now, for training may have changed them."""

    def stack(*linears: Callable[[Layer], nn.Linear]) -> tuple[np.ndarray, np.ndarray]:
        parts = [[linear(layer) for linear in linears] for layer in layers]
        weights = torch.stack([torch.cat([part.weight for part in layer]) for layer in parts])
        biases = torch.stack([torch.cat([part.bias for part in layer]) for layer in parts])
        return _array(weights.to(stored)), _array(biases.float())

    def norm(module: nn.Module) -> Tensor:
        return torch.stack([cast(Tensor, module.weight), cast(Tensor, module.bias)])

    pre = isinstance(decoder.norm, nn.LayerNorm)
    norms = torch.stack([torch.stack([norm(part) for part in its.norms]) for its in layers])
    read_out = decoder.embedding if decoder.read_out is None else decoder.read_out
    return _Weights(
        _array(decoder.embedding.weight.float() * math.sqrt(decoder.width)),
        _array(cast(Tensor, decoder.positions).float()),
        *stack(lambda its: its.self_attention.query, lambda its: its.self_attention.key_value),
        *stack(lambda its: its.self_attention.out),
        *stack(lambda its: its.cross_attention.query),
        *stack(lambda its: its.cross_attention.out),
        *stack(lambda its: its.expand),
        *stack(lambda its: its.contract),
        _array(cast(Tensor, read_out.weight).to(stored)),
        _array(decoder.bias.float()),
        _array(norms.float()),
        _array(norm(decoder.norm if pre else layers[-1].norms[-1]).float()),
    )


def _projected(
    layers: list[Layer], seen: Float[Tensor, "M D"]
) -> Shaped[np.ndarray, "2 layers heads M d"]:
    """Return the keys and values of a page's cells, in the type that these have."""
    projected = []
    for layer in layers:
        attention = layer.cross_attention
        weight, bias = (part.to(seen) for part in attention.key_value.parameters())
        both = F.linear(seen, weight, bias).unflatten(1, (2, attention.heads, -1))
        projected.append(both.permute(1, 2, 0, 3))
    return _array(torch.stack(projected, dim=1))


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; NumPy has no bfloat16, so of those it is the bits."""
    bits = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
    return bits.detach().contiguous().numpy()


@intrinsic
@no_type_check
def _widened(_context, _bits):
    def generate(_context, builder, _signature, arguments):
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@no_type_check
def _number(stored):
    """Return what is stored as float32 or as the bits of bfloat16; for compiled functions alone."""


@overload(_number)
@no_type_check
def _number_for(stored):
    if stored == types.uint16:
        return lambda stored: _widened(stored)
    return lambda stored: stored


@_compiled
@no_type_check
def _read_page(weights, heads, pre, epsilon, keys, values, start, end, tokens, scores):
    """Write a page's tokens, up to its end, and their log-probabilities into `tokens` and `scores`.

    Keys and values are "layers heads M d".
    """
    num_layers, width, hidden_width = weights.contract.shape
    steps, cells, head_width = len(tokens), keys.shape[2], width // heads
    past_keys = np.empty((num_layers, heads, steps, head_width), np.float32)
    past_values = np.empty_like(past_keys)
    states, inputs = np.empty(width, np.float32), np.empty(width, np.float32)
    queries, gathered = np.empty_like(states), np.empty_like(states)
    own, hidden = np.empty(3 * width, np.float32), np.empty(hidden_width, np.float32)
    update, logits = np.empty_like(states), np.empty(len(weights.read_out), np.float32)
    places = max(steps, cells)
    shares, powers = np.empty(places, np.float32), np.empty(places, np.int32)

    token = start
    for step in range(steps):
        states[:] = weights.embedding[token] + weights.positions[step]
        for layer in range(num_layers):
            norms = weights.norms[layer]

            _begin(states, pre, norms[0], epsilon, inputs)
            _multiply(weights.own[layer], weights.own_bias[layer], inputs, own)
            past = past_keys[layer], past_values[layer]
            for head in range(heads):
                place = width + head * head_width
                past[0][head, step] = own[place : place + head_width]
                past[1][head, step] = own[place + width : place + width + head_width]
            _attend(own[:width], past[0], past[1], step + 1, shares, powers, gathered)
            _multiply(weights.own_out[layer], weights.own_out_bias[layer], gathered, update)
            _join(states, update, pre, norms[0], epsilon)

            _begin(states, pre, norms[1], epsilon, inputs)
            _multiply(weights.cross[layer], weights.cross_bias[layer], inputs, queries)
            _attend(queries, keys[layer], values[layer], cells, shares, powers, gathered)
            _multiply(weights.cross_out[layer], weights.cross_out_bias[layer], gathered, update)
            _join(states, update, pre, norms[1], epsilon)

            _begin(states, pre, norms[2], epsilon, inputs)
            _multiply(weights.expand[layer], weights.expand_bias[layer], inputs, hidden)
            for index in range(hidden_width):
                hidden[index] = max(hidden[index], np.float32(0.0))
            _multiply(weights.contract[layer], weights.contract_bias[layer], hidden, update)
            _join(states, update, pre, norms[2], epsilon)

        _begin(states, pre, weights.last_norm, epsilon, inputs)
        _multiply(weights.read_out, weights.read_out_bias, inputs, logits)
        token = np.argmax(logits)
        total = np.float32(0.0)
        for index in range(len(logits)):
            total += math.exp(logits[index] - logits[token])
        tokens[step], scores[step] = token, -math.log(total)
        if token == end:
            break


@_compiled
@no_type_check
def _begin(states, pre, norm, epsilon, inputs):
    """Put what a block sees into `inputs`."""
    if pre:
        _normalise(states, norm, epsilon, inputs)
    else:
        inputs[:] = states


@_compiled
@no_type_check
def _join(states, update, pre, norm, epsilon):
    """Add what a block returns to the states."""
    for index in range(len(states)):
        states[index] += update[index]
    if not pre:
        _normalise(states, norm, epsilon, states)


@_compiled
@no_type_check
def _normalise(states, norm, epsilon, out):
    width = len(states)
    mean, square = np.float32(0.0), np.float32(0.0)
    for index in range(width):
        mean += states[index]
    mean /= np.float32(width)
    for index in range(width):
        square += (states[index] - mean) ** 2
    scale = np.float32(1.0 / math.sqrt(square / width + epsilon))
    for index in range(width):
        out[index] = (states[index] - mean) * scale * norm[0, index] + norm[1, index]


@_compiled
@no_type_check
def _multiply(weight, bias, inputs, out):
    """Put weight @ inputs + bias into `out`."""
    for row in range(weight.shape[0]):
        total = np.float32(0.0)
        for column in range(weight.shape[1]):
            total += _number(weight[row, column]) * inputs[column]
        out[row] = total + bias[row]


@_compiled
@no_type_check
def _attend(queries, keys, values, length, shares, powers, gathered):
    """Put what each head gathers of its first `length` values into `gathered`.

    Keys and values are "heads M d".
    """
    heads, width = keys.shape[0], keys.shape[2]
    scale = np.float32(1.0 / math.sqrt(width))
    for head in range(heads):
        begin = head * width
        for place in range(length):
            score = np.float32(0.0)
            for index in range(width):
                score += queries[begin + index] * _number(keys[head, place, index])
            shares[place] = score * scale
        total = _exponentials(shares, powers, length)
        out = gathered[head * width : (head + 1) * width]
        out[:] = 0.0
        eights = (
            length - length % 8
        )  # at a time, or the sums would be fetched more often than the values
        for place in range(0, eights, 8):
            some = values[head, place : place + 8]
            a, b, c, d, e, f, g, h = (
                shares[place], shares[place + 1], shares[place + 2], shares[place + 3],
                shares[place + 4], shares[place + 5], shares[place + 6], shares[place + 7],
            )  # fmt: skip
            for index in range(width):
                out[index] += (
                    (a * _number(some[0, index]) + b * _number(some[1, index]))
                    + (c * _number(some[2, index]) + d * _number(some[3, index]))
                    + (e * _number(some[4, index]) + f * _number(some[5, index]))
                    + (g * _number(some[6, index]) + h * _number(some[7, index]))
                )
        for place in range(eights, length):
            for index in range(width):
                out[index] += shares[place] * _number(values[head, place, index])
        for index in range(width):
            out[index] /= total


@_compiled
@no_type_check
def _exponentials(values, powers, length):
    """Replace `values` by exp(value - the largest); return their sum.

    A CPU computes many of these at once, and of math.exp one: exp(x) is 2**n * exp(r) with |r| < 0.35, the
    one written as bits into `powers`, the other by its series, whose rest is less than a float's rounding.
    """
    largest, total = values[0], np.float32(0.0)
    for index in range(length):
        largest = max(largest, values[index])
    for index in range(length):
        value = max(values[index] - largest, _LEAST)
        power = np.float32(math.floor(value / _LN_2 + np.float32(0.5)))
        rest = value - power * _LN_2
        term = series = np.float32(1.0)
        for order in range(1, 7):
            term *= rest / np.float32(order)
            series += term
        values[index] = series
        powers[index] = (np.int32(power) + _EXPONENT_OF_1) << _BITS_OF_FRACTION
    scales = powers.view(np.float32)
    for index in range(length):
        values[index] *= scales[index]
        total += values[index]
    return total
