"""Greedy reading on a CPU: all steps of a page in one compiled function, a thread for each page.

A step of one page is products of matrices and a vector, which wait for their weights to come from the CPU's
last cache or from memory: under autocast to bfloat16 half as long. Weights that are whole numbers of a byte,
as a release has them, stay so, and the page's keys and values become such: a quarter. All sums are in
float32. Written with PyTorch's operations a step would be ninety of them, each to be found, and threads would
meet in each; here a thread waits for no other before its page has ended. Numba compiles the functions at the
first reading on a machine, in some seconds, and keeps them.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
_TINY = np.float32(1e-30)  # whose reciprocal is a float, too
_WHOLE = 1e-8
"""Mean square of what rounding changes, in steps: 5e-12 in a release, 0.08 in a model of other weights."""


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function by Numba. Sums are taken in any order, so that they are vectorised."""
    by_numba = partial(njit, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
    try:
        return by_numba(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return by_numba()(function)


class _Rows(NamedTuple):
    """Vectors, each of them its numbers times its scale."""

    numbers: Shaped[np.ndarray, "*rows D"]  # float32, the bits of bfloat16, or int8
    scales: Float32[np.ndarray, "*rows"]


class _Linear(NamedTuple):
    """Products of one kind, those of all layers stacked."""

    matrix: _Rows  # "layers out in"
    bias: Float32[np.ndarray, "layers out"]


class _Weights(NamedTuple):
    """A decoder's weights; all matrices have numbers of one type."""

    embedding: Float32[np.ndarray, "V D"]  # times sqrt(D)
    positions: Float32[np.ndarray, "T D"]
    norms: Float32[np.ndarray, "layers 3 2 D"]  # scale and shift of each block's
    last_norm: Float32[np.ndarray, "2 D"]  # used where norms stand before their blocks
    own: _Linear  # to queries, keys and values
    own_out: _Linear
    cross: _Linear  # to queries
    cross_out: _Linear
    expand: _Linear
    contract: _Linear
    read_out: _Linear  # of one layer


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
    computed = torch.bfloat16 if half else torch.float32
    ends = start, -1 if end is None else end
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        weights = _stacked(decoder, layers, computed)
        in_bytes = weights.own.matrix.numbers.dtype == np.int8

        @torch.inference_mode()
        def read(page: int) -> None:
            cells = memory[page] if memory_mask is None else memory[page, memory_mask[page]]
            seen = _projected(layers, cells.to(computed), in_bytes=in_bytes)
            into = written[page].numpy(), scores[page].numpy()
            _read_page(weights, heads, pre, epsilon, seen, *ends, *into)

        if count == 1:
            read(0)
            return written, scores
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for each of the pool's: no product of one page waits for others
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, range(count)))  # raises what a page has raised
        finally:
            torch.set_num_threads(threads)
    return written, scores


def _stacked(decoder: Decoder, layers: list[Layer], stored: torch.dtype) -> _Weights:
    """Return the weights as they are now, for training may have changed them; `stored` or in bytes."""

    def linears(its: Layer) -> list[list[nn.Linear]]:
        own, cross = its.self_attention, its.cross_attention
        attention = [[own.query, own.key_value], [own.out], [cross.query], [cross.out]]
        return [*attention, [its.expand], [its.contract]]

    def stack(parts: list[list[Tensor]], dtype: torch.dtype = torch.float32) -> np.ndarray:
        # by NumPy, which has no threads that would meet
        return np.stack([np.concatenate([_array(it.to(dtype)) for it in part]) for part in parts])

    kinds = [*zip(*map(linears, layers), strict=True)]
    read_out = decoder.embedding if decoder.read_out is None else decoder.read_out
    weights = [[[it.weight for it in its] for its in kind] for kind in kinds]
    weights.append([[cast(nn.Parameter, read_out.weight)]])
    biases = [[[it.bias for it in its] for its in kind] for kind in kinds]
    biases.append([[decoder.bias]])

    def norm(module: nn.Module) -> Tensor:
        return torch.stack([cast(Tensor, module.weight), cast(Tensor, module.bias)])

    pre = isinstance(decoder.norm, nn.LayerNorm)
    norms = torch.stack([torch.stack([norm(part) for part in its.norms]) for its in layers])
    matrices = _whole(map(stack, weights)) or [_plain(stack(its, stored)) for its in weights]
    return _Weights(
        _array(decoder.embedding.weight.float() * math.sqrt(decoder.width)),
        _array(cast(Tensor, decoder.positions).float()),
        _array(norms.float()),
        _array(norm(decoder.norm if pre else layers[-1].norms[-1]).float()),
        *map(_Linear, matrices, map(stack, biases)),
    )


def _whole(matrices: Iterable[Float32[np.ndarray, "*rows D"]]) -> list[_Rows] | None:
    """Return matrices that `quantised.restore` has returned as what it was given; None if one is another."""
    found = []
    for matrix in matrices:
        rows, changed = _rounded(matrix)
        if not changed < _WHOLE:
            return None
        found.append(rows)
    return found


def _rounded(array: Float32[np.ndarray, "*rows D"]) -> tuple[_Rows, float]:
    """Return rows in bytes, 127 steps for the largest number of each, and the mean square of the change."""
    rows = _Rows(np.empty(array.shape, np.int8), np.empty(array.shape[:-1], np.float32))
    width = array.shape[-1]
    into = rows.numbers.reshape(-1, width), rows.scales.reshape(-1)
    return rows, _round(array.reshape(-1, width), *into) / array.size


def _plain(array: Shaped[np.ndarray, "*rows D"]) -> _Rows:
    return _Rows(array, np.ones(array.shape[:-1], np.float32))


def _projected(layers: list[Layer], seen: Float[Tensor, "M D"], *, in_bytes: bool) -> _Rows:
    """Return keys and values of a page's cells, "2 layers heads M d", in bytes or the type of the cells.

    The keys' scales hold what scores are divided by, sqrt(d).
    """
    heads, (count, width) = layers[0].cross_attention.heads, seen.shape
    shape = 2, len(layers), heads, count
    stored = np.dtype(np.int8) if in_bytes else _array(seen).dtype
    numbers = np.empty((*shape, width // heads), stored)
    scales = np.empty(shape, np.float32)
    for index, layer in enumerate(layers):
        weight, bias = (part.to(seen) for part in layer.cross_attention.key_value.parameters())
        both = F.linear(seen, weight, bias).unflatten(1, (2, heads, -1))
        rows = _rounded(_array(both.float()))[0] if in_bytes else _plain(_array(both))
        numbers[:, index] = rows.numbers.transpose(1, 2, 0, 3)  # in this order of memory, too
        scales[:, index] = rows.scales.transpose(1, 2, 0)
    scales[0] /= math.sqrt(width / heads)
    return _Rows(numbers, scales)


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
    """Return what is stored as float32, as the bits of bfloat16 or as int8; for compiled functions alone."""


@overload(_number)
@no_type_check
def _number_for(stored):
    if stored == types.uint16:
        return lambda stored: _widened(stored)
    return lambda stored: np.float32(stored)


@_compiled
@no_type_check
def _round(rows, numbers, scales):
    """Put rows in bytes into `numbers` and `scales`; return the sum of the squares of what that changes."""
    changed = np.float32(0.0)
    for row in range(len(rows)):
        largest = _TINY
        for index in range(rows.shape[1]):
            largest = max(largest, abs(rows[row, index]))
        scales[row] = scale = largest / np.float32(127.0)
        for index in range(rows.shape[1]):
            exact = rows[row, index] / scale
            whole = np.rint(exact)
            numbers[row, index] = np.int8(whole)
            changed += (exact - whole) ** 2
    return changed


@_compiled
@no_type_check
def _read_page(weights, heads, pre, epsilon, seen, start, end, tokens, scores):
    """Write a page's tokens, up to its end, and their log-probabilities into `tokens` and `scores`."""
    keys, values = _Rows(seen.numbers[0], seen.scales[0]), _Rows(seen.numbers[1], seen.scales[1])
    num_layers, width, hidden_width = weights.contract.matrix.numbers.shape
    steps, cells, head_width = len(tokens), keys.numbers.shape[2], width // heads
    shape = num_layers, heads, steps, head_width
    ones = np.ones(shape[:3], np.float32)
    past_keys = _Rows(np.empty(shape, np.float32), ones / np.float32(math.sqrt(head_width)))
    past_values = _Rows(np.empty(shape, np.float32), ones)
    states, inputs = np.empty(width, np.float32), np.empty(width, np.float32)
    queries, gathered = np.empty_like(states), np.empty_like(states)
    own, hidden = np.empty(3 * width, np.float32), np.empty(hidden_width, np.float32)
    update, logits = np.empty_like(states), np.empty(weights.read_out.bias.shape[1], np.float32)
    places = max(steps, cells)
    shares, powers = np.empty(places, np.float32), np.empty(places, np.int32)

    token = start
    for step in range(steps):
        states[:] = weights.embedding[token] + weights.positions[step]
        for layer in range(num_layers):
            norms = weights.norms[layer]

            _begin(states, pre, norms[0], epsilon, inputs)
            _apply(weights.own, layer, inputs, own)
            for head in range(heads):
                place = width + head * head_width
                past_keys.numbers[layer, head, step] = own[place : place + head_width]
                place += width
                past_values.numbers[layer, head, step] = own[place : place + head_width]
            _attend(own, past_keys, past_values, layer, step + 1, shares, powers, gathered)
            _apply(weights.own_out, layer, gathered, update)
            _join(states, update, pre, norms[0], epsilon)

            _begin(states, pre, norms[1], epsilon, inputs)
            _apply(weights.cross, layer, inputs, queries)
            _attend(queries, keys, values, layer, cells, shares, powers, gathered)
            _apply(weights.cross_out, layer, gathered, update)
            _join(states, update, pre, norms[1], epsilon)

            _begin(states, pre, norms[2], epsilon, inputs)
            _apply(weights.expand, layer, inputs, hidden)
            for index in range(hidden_width):
                hidden[index] = max(hidden[index], np.float32(0.0))
            _apply(weights.contract, layer, hidden, update)
            _join(states, update, pre, norms[2], epsilon)

        _begin(states, pre, weights.last_norm, epsilon, inputs)
        _apply(weights.read_out, 0, inputs, logits)
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
def _apply(linear, layer, inputs, out):
    """Put matrix @ inputs + bias into `out`."""
    _multiply(linear.matrix.numbers[layer], linear.matrix.scales[layer], len(out), inputs, out)
    for row in range(len(out)):
        out[row] += linear.bias[layer, row]


@_compiled
@no_type_check
def _multiply(numbers, scales, length, inputs, out):
    """Put the products of the first `length` rows and the inputs into `out`."""
    fours = length - length % 4  # at a time: inputs are fetched once for them
    for row in range(0, fours, 4):
        some = numbers[row : row + 4]
        a = b = c = d = np.float32(0.0)
        for column in range(len(inputs)):
            a += _number(some[0, column]) * inputs[column]
            b += _number(some[1, column]) * inputs[column]
            c += _number(some[2, column]) * inputs[column]
            d += _number(some[3, column]) * inputs[column]
        out[row], out[row + 1], out[row + 2], out[row + 3] = a, b, c, d
    for row in range(fours, length):
        total = np.float32(0.0)
        for column in range(len(inputs)):
            total += _number(numbers[row, column]) * inputs[column]
        out[row] = total
    for row in range(length):
        out[row] *= scales[row]


@_compiled
@no_type_check
def _attend(queries, keys, values, layer, length, shares, powers, gathered):
    """Put what each head gathers of its first `length` values into `gathered`."""
    heads, width = keys.numbers.shape[1], keys.numbers.shape[3]
    for head in range(heads):
        place = head * width
        query, out = queries[place : place + width], gathered[place : place + width]
        _multiply(keys.numbers[layer, head], keys.scales[layer, head], length, query, shares)
        total = _exponentials(shares, powers, length)
        numbers, scales = values.numbers[layer, head], values.scales[layer, head]
        for place in range(length):
            shares[place] *= scales[place]
        out[:] = 0.0
        fours = length - length % 4  # at a time, or sums would be fetched more often than values
        for place in range(0, fours, 4):
            some = numbers[place : place + 4]
            a, b, c, d = shares[place], shares[place + 1], shares[place + 2], shares[place + 3]
            for index in range(width):
                out[index] += (a * _number(some[0, index]) + b * _number(some[1, index])) + (
                    c * _number(some[2, index]) + d * _number(some[3, index])
                )
        for place in range(fours, length):
            for index in range(width):
                out[index] += shares[place] * _number(numbers[place, index])
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
        power = np.floor(value / _LN_2 + np.float32(0.5))
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
