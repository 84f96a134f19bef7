"""Triton kernels of one decoder step: what a row of the batch needs of one token, in few launches.

A step of a small decoder is bound by its launches, not by its arithmetic: written with torch's operations
it is some eighty of them. `attention_block`, `feed_forward_block` and `read_out` do it in three a layer and
one more, a program for each row and head or part of the hidden layer. Such programs cannot wait for each
other, so each leaves its share of the sum ("parts"), and the next kernel adds them up.

For many rows the weights are better multiplied by cuBLAS; `attend` and `join` are what is left then.

Rows that have ended leave at once and cost nothing. On Hopper (AHEAD) a kernel is started while the one
before it still runs, and fetches its weights meanwhile; what that one writes it reads after `_wait`. All
sums are in float32, whatever the weights are in.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _wait(AHEAD: tl.constexpr):
    """Let the next kernel start, and wait for the one before; every program must, ended or not."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
@no_type_check
def _total(
    states,
    parts,
    bias,
    row,
    columns,
    inside,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Return a row of the residual stream: what it was, and the parts of the update."""
    total = tl.load(states + row * WIDTH + columns, mask=inside, other=0.0)
    if PARTS > 0:
        index = tl.arange(0, BLOCK_PARTS)
        place = (row * PARTS + index[:, None]) * WIDTH + columns[None, :]
        update = tl.load(parts + place, mask=(index[:, None] < PARTS) & inside[None, :], other=0.0)
        total += tl.sum(update.to(tl.float32), axis=0)
        total += tl.load(bias + columns, mask=inside, other=0.0)
    return total


@triton.jit
@no_type_check
def standardised(values, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Return values of mean 0 and variance 1."""
    centred = tl.where(inside, values - tl.sum(values, axis=0) / WIDTH, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)


@triton.jit
@no_type_check
def _normalised(values, weight, bias, columns, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    biases = tl.load(bias + columns, mask=inside, other=0.0)
    return standardised(values, inside, WIDTH, EPS) * weights + biases


@triton.jit
@no_type_check
def _inputs(
    states_in,
    states_out,
    parts,
    bias,
    norm_weight,
    norm_bias,
    row,
    writes,
    columns,
    inside,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PRE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Return a block's inputs, and let one program of the row keep the residual stream.

    Before a block (PRE) the norm is for its inputs alone; after one it is part of the stream, and the
    embeddings (no parts) have none.
    """
    values = _total(states_in, parts, bias, row, columns, inside, WIDTH, PARTS, BLOCK_PARTS)
    inputs = values
    if PRE or PARTS > 0:
        inputs = _normalised(values, norm_weight, norm_bias, columns, inside, WIDTH, EPS)
    if writes:
        tl.store(states_out + row * WIDTH + columns, values if PRE else inputs, mask=inside)
    return inputs


@triton.jit
@no_type_check
def tile(weight, first, lanes, in_lanes, columns, inside, WIDTH: tl.constexpr):
    """Return rows `first + lanes` of a linear layer's weights.

    Asked for before the inputs are known, they are on their way while those are computed.
    """
    place = (first + lanes)[:, None] * WIDTH + columns[None, :]
    return tl.load(weight + place, mask=in_lanes[:, None] & inside[None, :], other=0.0)


@triton.jit
@no_type_check
def columns_tile(weight, first, lanes, in_lanes, columns, inside, WIDTH: tl.constexpr):
    """Return columns `first + lanes` of a linear layer's weights of WIDTH inputs."""
    place = columns[:, None] * WIDTH + first + lanes[None, :]
    return tl.load(weight + place, mask=inside[:, None] & in_lanes[None, :], other=0.0)


@triton.jit
@no_type_check
def product(rows, inputs):
    """Return the products of a vector with each of some rows of weights."""
    return tl.sum(rows.to(tl.float32) * inputs[None, :], axis=1)


@triton.jit
@no_type_check
def _linear(rows, bias, inputs, first, lanes, in_lanes):
    """Return some outputs of a linear layer, whose weights `tile` has given."""
    return product(rows, inputs) + tl.load(bias + first + lanes, mask=in_lanes, other=0.0)


@triton.jit
@no_type_check
def _gather(
    query,
    keys,
    values,
    seen,
    cells,
    lanes,
    in_lanes,
    most,
    weights,
    gathered,
    base,
    HEAD: tl.constexpr,
):
    """Return the running maximum, sum and weighted values of a softmax, some cells further."""
    place = base + cells[:, None] * HEAD + lanes[None, :]
    inside = seen[:, None] & in_lanes[None, :]
    key = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    scores = tl.where(seen, tl.sum(key * query[None, :], axis=1), float("-inf"))
    highest = tl.maximum(most, tl.max(scores, axis=0))
    shares, shrink = tl.exp(scores - highest), tl.exp(most - highest)
    gathered = gathered * shrink + tl.sum(shares[:, None] * value, axis=0)
    return highest, weights * shrink + tl.sum(shares, axis=0), gathered


@triton.jit
@no_type_check
def attended(
    query,
    keys,
    values,
    mask,
    row,
    base,
    count,
    lanes,
    in_lanes,
    most,
    weights,
    gathered,
    HEAD: tl.constexpr,
    CELLS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return what a query gathers from the first `count` cells, on top of what it has gathered."""
    for start in range(0, count, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        seen = cells < count
        if MASKED:
            seen = seen & (tl.load(mask + row * CELLS + cells, mask=seen, other=0) != 0)
        most, weights, gathered = _gather(
            query, keys, values, seen, cells, lanes, in_lanes, most, weights, gathered, base, HEAD
        )
    return gathered / weights


@triton.jit
@no_type_check
def attention_block(
    states_in, states_out, parts_in, bias_in, norm_weight, norm_bias,
    weight, bias, keys, values, mask, positions, ended, out_weight, parts_out,
    scale,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, CELLS: tl.constexpr,
    SELF: tl.constexpr, MASKED: tl.constexpr, PRE: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write one head's part of an attention block's update.

    Self-attention puts the token's key and value at `positions` into the cache, and sees those before;
    cross-attention sees all cells, or those of the mask. `weight` holds the projections to queries (and
    keys, and values) one under the other.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_HEAD)
    inside, in_lanes = columns < WIDTH, lanes < HEAD
    first, base = head * HEAD, (row * HEADS + head) * CELLS * HEAD
    queries = tile(weight, first, lanes, in_lanes, columns, inside, WIDTH)
    outputs = columns_tile(out_weight, first, lanes, in_lanes, columns, inside, WIDTH)
    if SELF:
        to_keys = tile(weight, WIDTH + first, lanes, in_lanes, columns, inside, WIDTH)
        to_values = tile(weight, 2 * WIDTH + first, lanes, in_lanes, columns, inside, WIDTH)
    _wait(AHEAD)
    if tl.load(ended + row) == 0:
        inputs = _inputs(
            states_in, states_out, parts_in, bias_in, norm_weight, norm_bias, row, head == 0,
            columns, inside, WIDTH, PARTS, BLOCK_PARTS, PRE, EPS,
        )  # fmt: skip
        query = _linear(queries, bias, inputs, first, lanes, in_lanes) * scale
        count = CELLS
        # finite: cells before the first that is seen weigh nothing
        most, weights = tl.full([], -1e30, tl.float32), tl.full([], 0.0, tl.float32)
        gathered = tl.zeros([BLOCK_HEAD], dtype=tl.float32)
        if SELF:
            key = _linear(to_keys, bias, inputs, WIDTH + first, lanes, in_lanes)
            value = _linear(to_values, bias, inputs, 2 * WIDTH + first, lanes, in_lanes)
            key, value = key.to(keys.dtype.element_ty), value.to(values.dtype.element_ty)
            count = tl.load(positions + row)
            place = base + count * HEAD + lanes
            tl.store(keys + place, key, mask=in_lanes)
            tl.store(values + place, value, mask=in_lanes)
            # its own cell is taken from here: what was just stored cannot be relied upon yet
            most = tl.sum(query * key.to(tl.float32), axis=0)
            weights, gathered = tl.full([], 1.0, tl.float32), value.to(tl.float32)
        gathered = attended(
            query, keys, values, mask, row, base, count, lanes, in_lanes, most, weights, gathered,
            HEAD, CELLS, MASKED, BLOCK,
        )  # fmt: skip
        part = product(outputs, gathered)
        tl.store(parts_out + (row * HEADS + head) * WIDTH + columns, part, mask=inside)


@triton.jit
@no_type_check
def feed_forward_block(
    states_in, states_out, parts_in, bias_in, norm_weight, norm_bias,
    expand_weight, expand_bias, ended, contract_weight, parts_out,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, PRE: tl.constexpr, EPS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the update's part of `BLOCK_HIDDEN` hidden units."""
    row, split = tl.program_id(0), tl.program_id(1)
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_HIDDEN)
    first = split * BLOCK_HIDDEN
    inside, in_lanes = columns < WIDTH, first + lanes < HIDDEN
    expand = tile(expand_weight, first, lanes, in_lanes, columns, inside, WIDTH)
    contract = columns_tile(contract_weight, first, lanes, in_lanes, columns, inside, HIDDEN)
    _wait(AHEAD)
    if tl.load(ended + row) == 0:
        inputs = _inputs(
            states_in, states_out, parts_in, bias_in, norm_weight, norm_bias, row, split == 0,
            columns, inside, WIDTH, PARTS, BLOCK_PARTS, PRE, EPS,
        )  # fmt: skip
        hidden = tl.maximum(_linear(expand, expand_bias, inputs, first, lanes, in_lanes), 0.0)
        part = product(contract, hidden)
        splits = tl.num_programs(1)
        tl.store(parts_out + (row * splits + split) * WIDTH + columns, part, mask=inside)


@triton.jit
@no_type_check
def read_out(
    states_in, states_out, parts_in, bias_in, norm_weight, norm_bias, weight, bias,
    embedding, codes, positions, ended, written, scores,
    root, end, last,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LENGTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, EPS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Write a row's likeliest token with its log-probability, and begin its next step.

    The row ends with the token `end`, or with position `last`.
    """
    row = tl.program_id(0)
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_TOKENS)
    inside = columns < WIDTH
    rows = tile(weight, 0, lanes, lanes < TOKENS, columns, inside, WIDTH)
    _wait(AHEAD)
    if tl.load(ended + row) == 0:
        inputs = _total(
            states_in, parts_in, bias_in, row, columns, inside, WIDTH, PARTS, BLOCK_PARTS
        )
        inputs = _normalised(inputs, norm_weight, norm_bias, columns, inside, WIDTH, EPS)
        highest, weights, token = float("-inf"), 0.0, 0
        for first in tl.static_range(0, TOKENS, BLOCK_TOKENS):
            in_lanes = first + lanes < TOKENS
            if first > 0:
                rows = tile(weight, first, lanes, in_lanes, columns, inside, WIDTH)
            logits = _linear(rows, bias, inputs, first, lanes, in_lanes)
            logits = tl.where(in_lanes, logits, float("-inf"))
            best = tl.max(logits, axis=0)
            choice = first + tl.argmax(logits, axis=0)
            token = tl.where(best > highest, choice, token)
            top = tl.maximum(highest, best)
            weights = weights * tl.exp(highest - top) + tl.sum(tl.exp(logits - top), axis=0)
            highest = top
        position = tl.load(positions + row)
        tl.store(written + row * LENGTH + position, token.to(tl.int64))
        tl.store(scores + row * LENGTH + position, -tl.log(weights))
        tl.store(ended + row, ((token == end) | (position >= last)).to(tl.int32))
        tl.store(positions + row, position + 1)
        more = inside & (position < last)
        begun = tl.load(embedding + token * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        begun = begun * root + tl.load(
            codes + (position + 1) * WIDTH + columns, mask=more, other=0.0
        )
        tl.store(states_out + row * WIDTH + columns, begun, mask=inside)


@triton.jit
@no_type_check
def join(
    states_in, states_out, parts_in, bias_in, norm_weight, norm_bias, ended, inputs_out,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    PRE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Write a block's inputs and the residual stream before it."""
    row = tl.program_id(0)
    if tl.load(ended + row) == 0:
        columns = tl.arange(0, BLOCK_WIDTH)
        inside = columns < WIDTH
        inputs = _inputs(
            states_in, states_out, parts_in, bias_in, norm_weight, norm_bias, row, row >= 0,
            columns, inside, WIDTH, PARTS, BLOCK_PARTS, PRE, EPS,
        )  # fmt: skip
        tl.store(inputs_out + row * WIDTH + columns, inputs, mask=inside)


@triton.jit
@no_type_check
def attend(
    projected, keys, values, mask, positions, ended, gathered_out,
    scale,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    CELLS: tl.constexpr, SELF: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what one head gathers, its query (key, value) being projected already."""
    row, head = tl.program_id(0), tl.program_id(1)
    if tl.load(ended + row) == 0:
        lanes = tl.arange(0, BLOCK_HEAD)
        in_lanes = lanes < HEAD
        base = (row * HEADS + head) * CELLS * HEAD
        start = projected + row * (3 * WIDTH if SELF else WIDTH) + head * HEAD + lanes
        query = tl.load(start, mask=in_lanes, other=0.0).to(tl.float32) * scale
        count = CELLS
        most, weights = tl.full([], -1e30, tl.float32), tl.full([], 0.0, tl.float32)
        gathered = tl.zeros([BLOCK_HEAD], dtype=tl.float32)
        if SELF:
            key = tl.load(start + WIDTH, mask=in_lanes, other=0.0)
            value = tl.load(start + 2 * WIDTH, mask=in_lanes, other=0.0)
            count = tl.load(positions + row)
            place = base + count * HEAD + lanes
            tl.store(keys + place, key, mask=in_lanes)
            tl.store(values + place, value, mask=in_lanes)
            most = tl.sum(query * key.to(tl.float32), axis=0)
            weights, gathered = tl.full([], 1.0, tl.float32), value.to(tl.float32)
        gathered = attended(
            query, keys, values, mask, row, base, count, lanes, in_lanes, most, weights, gathered,
            HEAD, CELLS, MASKED, BLOCK,
        )  # fmt: skip
        tl.store(gathered_out + row * WIDTH + head * HEAD + lanes, gathered, mask=in_lanes)
