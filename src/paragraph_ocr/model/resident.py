"""Greedy reading of one page on a GPU by a single kernel, whose programs stay until the text has ended.

One row's step is a chain of blocks, each too short to be worth a launch. Here every head, and every part
of a feed-forward block, has a program of its own that stays on its processor for all steps. It fetches its
weights while it waits for the stage before, adds up what that one has left, leaves its own part, and says
so. A layer is three stages; the read-out is one more.

Waiting for each other is sound because all programs run at once: they are no more than the card has
processors, and launched as a cooperative grid. In Triton's interpreter they run one after the other in the
order of their stages, a step at a time, so that there nobody waits in vain.
"""

import math
from collections.abc import Callable
from typing import cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paragraph_ocr.model.decoder import Decoder, Layer
from paragraph_ocr.model.kernels import attended, columns_tile, product, standardised, tile

_SPLIT = 64
"""Hidden units that one program of a feed-forward block computes."""

_LAUNCH = {"BLOCK": 256, "num_warps": 8}
"""Cells looked at together, and warps of a program."""


_ENDED: tl.constexpr = tl.constexpr(1 << 20)
"""What a program adds to its stage's count when the text has ended: more than its programs' steps are."""


@triton.jit
@no_type_check
def _await(arrived, stage, count):
    """Return a stage's count once its programs have done it `count` times in all."""
    done = tl.atomic_add(arrived + stage, 0, sem="acquire")
    while done < count:
        done = tl.atomic_add(arrived + stage, 0, sem="acquire")
    return done


@triton.jit
@no_type_check
def _arrive(arrived, stage, over):
    """Say that this program has done its stage once more, and whether the text is over."""
    tl.debug_barrier()  # until all of its threads have written
    tl.atomic_add(arrived + stage, tl.where(over, _ENDED, 1), sem="release")


@triton.jit
@no_type_check
def _constants(
    biases, norm_weights, norm_biases, stage, columns, inside,
    WIDTH: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Return the bias of the update before a stage, and weight and bias of the norm of its inputs."""
    before = tl.maximum(stage - 1, 0)
    bias = tl.load(biases + before * WIDTH + columns, mask=inside & (stage > 0), other=0.0)
    norm = (stage if PRE else before) * WIDTH + columns
    weight = tl.load(norm_weights + norm, mask=inside, other=0.0)
    return bias, weight, tl.load(norm_biases + norm, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _stage_inputs(
    stream, parts, bias, norm_weight, norm_bias, stage, writes, columns, inside,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr,
    PRE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Return a stage's inputs, from the residual stream and the PARTS that the stage before has left.

    Before a block (PRE) the norm is for its inputs alone; after one it is part of the stream, and the
    embeddings, before stage 0, have none. One program keeps the stream for the stage after.
    """
    index = tl.arange(0, BLOCK_MOST)
    seen = (index[:, None] < PARTS) & inside[None, :] & (stage > 0)
    place = ((stage - 1) * MOST + index[:, None]) * WIDTH + columns[None, :]
    update = tl.load(parts + place, mask=seen, other=0.0)
    values = tl.load(stream + stage * WIDTH + columns, mask=inside, other=0.0)
    values += bias + tl.sum(update, axis=0)
    inputs = standardised(values, inside, WIDTH, EPS) * norm_weight + norm_bias
    if not PRE:
        inputs = tl.where(stage > 0, inputs, values)
    if writes:
        tl.store(stream + (stage + 1) * WIDTH + columns, values if PRE else inputs, mask=inside)
    return inputs


@triton.jit
@no_type_check
def _attention_stages(
    weight, bias, out_weight, cache, mask,
    stream, parts, biases, norm_weights, norm_biases, arrived,
    layer, head, first, steps, scale,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, HEADS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, SPLITS: tl.constexpr, CELLS: tl.constexpr,
    SELF: tl.constexpr, MASKED: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr,
    PRE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do one head's part of an attention block, step after step.

    `weight` holds a layer's projections to queries (and keys, and values) one under the other.
    """
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_HEAD)
    inside, in_lanes = columns < WIDTH, lanes < HEAD
    rows = (3 if SELF else 1) * WIDTH
    weight, bias = weight + layer * rows * WIDTH, bias + layer * rows
    out_weight = out_weight + layer * WIDTH * WIDTH
    start, base = head * HEAD, (2 * layer * HEADS + head) * CELLS * HEAD
    values = cache + HEADS * CELLS * HEAD
    stage = 3 * layer + (0 if SELF else 1)
    before, parts_before = stage - 1, HEADS
    if SELF:  # after a feed-forward block, or the read-out of the step before
        before = tl.where(layer > 0, stage - 1, 3 * LAYERS)
        parts_before = SPLITS
    update_bias, norm_weight, norm_bias = _constants(
        biases, norm_weights, norm_biases, stage, columns, inside, WIDTH, PRE
    )
    query_bias = tl.load(bias + start + lanes, mask=in_lanes, other=0.0)
    if SELF:
        key_bias = tl.load(bias + WIDTH + start + lanes, mask=in_lanes, other=0.0)
        value_bias = tl.load(bias + 2 * WIDTH + start + lanes, mask=in_lanes, other=0.0)
    position, going = first, 1
    while going > 0:
        queries = tile(weight, start, lanes, in_lanes, columns, inside, WIDTH)
        outputs = columns_tile(out_weight, start, lanes, in_lanes, columns, inside, WIDTH)
        expected = (position + 1) * parts_before
        if SELF:
            to_keys = tile(weight, WIDTH + start, lanes, in_lanes, columns, inside, WIDTH)
            to_values = tile(weight, 2 * WIDTH + start, lanes, in_lanes, columns, inside, WIDTH)
            expected = tl.where(layer > 0, expected, position)
        over = _await(arrived, before, expected) >= _ENDED
        if not over:
            inputs = _stage_inputs(
                stream, parts, update_bias, norm_weight, norm_bias, stage, head == 0, columns, inside,
                WIDTH, parts_before, MOST, BLOCK_MOST, PRE, EPS,
            )  # fmt: skip
            query = (product(queries, inputs) + query_bias) * scale
            count = CELLS
            # finite: cells before the first that is seen weigh nothing
            most, weights = tl.full([], -1e30, tl.float32), tl.full([], 0.0, tl.float32)
            gathered = tl.zeros([BLOCK_HEAD], dtype=tl.float32)
            if SELF:
                key = (product(to_keys, inputs) + key_bias).to(cache.dtype.element_ty)
                value = (product(to_values, inputs) + value_bias).to(cache.dtype.element_ty)
                place = base + position * HEAD + lanes
                tl.store(cache + place, key, mask=in_lanes)
                tl.store(values + place, value, mask=in_lanes)
                # its own cell is taken from here: what was just stored cannot be relied upon yet
                count = position
                most = tl.sum(query * key.to(tl.float32), axis=0)
                weights, gathered = tl.full([], 1.0, tl.float32), value.to(tl.float32)
            gathered = attended(
                query, cache, values, mask, 0, base, count, lanes, in_lanes, most, weights, gathered,
                HEAD, CELLS, MASKED, BLOCK,
            )  # fmt: skip
            part = product(outputs, gathered)
            tl.store(parts + (stage * MOST + head) * WIDTH + columns, part, mask=inside)
        _arrive(arrived, stage, over)
        position += 1
        going = tl.where(over | (position >= first + steps), 0, 1)


@triton.jit
@no_type_check
def _feed_forward_stages(
    expand_weight, expand_bias, contract_weight,
    stream, parts, biases, norm_weights, norm_biases, arrived,
    layer, split, first, steps,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, HEADS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr, PRE: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Do BLOCK_HIDDEN hidden units of a feed-forward block, step after step."""
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_HIDDEN)
    start, stage = split * BLOCK_HIDDEN, 3 * layer + 2
    inside, in_lanes = columns < WIDTH, start + lanes < HIDDEN
    expand_weight = expand_weight + layer * HIDDEN * WIDTH
    contract_weight = contract_weight + layer * WIDTH * HIDDEN
    update_bias, norm_weight, norm_bias = _constants(
        biases, norm_weights, norm_biases, stage, columns, inside, WIDTH, PRE
    )
    hidden_bias = tl.load(expand_bias + layer * HIDDEN + start + lanes, mask=in_lanes, other=0.0)
    position, going = first, 1
    while going > 0:
        expand = tile(expand_weight, start, lanes, in_lanes, columns, inside, WIDTH)
        contract = columns_tile(contract_weight, start, lanes, in_lanes, columns, inside, HIDDEN)
        over = _await(arrived, stage - 1, (position + 1) * HEADS) >= _ENDED
        if not over:
            inputs = _stage_inputs(
                stream, parts, update_bias, norm_weight, norm_bias, stage, split == 0, columns, inside,
                WIDTH, HEADS, MOST, BLOCK_MOST, PRE, EPS,
            )  # fmt: skip
            part = product(contract, tl.maximum(product(expand, inputs) + hidden_bias, 0.0))
            tl.store(parts + (stage * MOST + split) * WIDTH + columns, part, mask=inside)
        _arrive(arrived, stage, over)
        position += 1
        going = tl.where(over | (position >= first + steps), 0, 1)


@triton.jit
@no_type_check
def _read_out_stages(
    weight, bias, embedding, codes, written, scores,
    stream, parts, biases, norm_weights, norm_biases, arrived,
    first, steps, root, end, last,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr,
    PRE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Write the likeliest token of each step with its log-probability, and begin the next one.

    The text ends with the token `end`, or with position `last`.
    """
    columns, lanes = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_TOKENS)
    inside, in_lanes = columns < WIDTH, lanes < TOKENS
    stage = 3 * LAYERS
    update_bias, norm_weight, norm_bias = _constants(
        biases, norm_weights, norm_biases, stage, columns, inside, WIDTH, PRE
    )
    logit_bias = tl.load(bias + lanes, mask=in_lanes, other=float("-inf"))
    position, going = first, 1
    while going > 0:
        rows = tile(weight, 0, lanes, in_lanes, columns, inside, WIDTH)
        over = _await(arrived, stage - 1, (position + 1) * SPLITS) >= _ENDED
        if not over:
            inputs = _stage_inputs(
                stream, parts, update_bias, norm_weight, norm_bias, stage, False, columns, inside,
                WIDTH, SPLITS, MOST, BLOCK_MOST, PRE, EPS,
            )  # fmt: skip
            logits = product(rows, inputs) + logit_bias
            token = tl.argmax(logits, axis=0)
            score = -tl.log(tl.sum(tl.exp(logits - tl.max(logits, axis=0)), axis=0))
            over = (token == end) | (position >= last)
            begun = tl.load(embedding + token * WIDTH + columns, mask=inside, other=0.0)
            more = inside & (position < last)
            code = tl.load(codes + (position + 1) * WIDTH + columns, mask=more, other=0.0)
            tl.store(stream + columns, begun.to(tl.float32) * root + code, mask=inside)
            tl.store(written + position, token.to(tl.int64))
            tl.store(scores + position, score)
        _arrive(arrived, stage, over)
        position += 1
        going = tl.where(over | (position >= first + steps), 0, 1)


@triton.jit(do_not_specialize=["first", "steps", "end", "last"])
@no_type_check
def _read(
    own_weight, own_bias, own_out, cross_weight, cross_bias, cross_out,
    expand_weight, expand_bias, contract_weight, biases, norm_weights, norm_biases,
    read_out, read_out_bias, embedding, codes,
    pasts, crosses, mask, stream, parts, arrived, written, scores,
    first, steps, scale, root, end, last,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, HEADS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, LENGTH: tl.constexpr,
    CELLS: tl.constexpr, MASKED: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr,
    PRE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do this program's part of `steps` steps from the position `first` on."""
    program = tl.program_id(0)
    layer, place = program // (2 * HEADS + SPLITS), program % (2 * HEADS + SPLITS)
    if layer == LAYERS:
        _read_out_stages(
            read_out, read_out_bias, embedding, codes, written, scores,
            stream, parts, biases, norm_weights, norm_biases, arrived,
            first, steps, root, end, last,
            LAYERS, WIDTH, BLOCK_WIDTH, SPLITS, TOKENS, BLOCK_TOKENS, MOST, BLOCK_MOST, PRE, EPS,
        )  # fmt: skip
    elif place < HEADS:
        _attention_stages(
            own_weight, own_bias, own_out, pasts, mask,
            stream, parts, biases, norm_weights, norm_biases, arrived,
            layer, place, first, steps, scale,
            LAYERS, WIDTH, BLOCK_WIDTH, HEADS, HEAD, BLOCK_HEAD, SPLITS, LENGTH,
            True, False, MOST, BLOCK_MOST, PRE, EPS, BLOCK,
        )  # fmt: skip
    elif place < 2 * HEADS:
        _attention_stages(
            cross_weight, cross_bias, cross_out, crosses, mask,
            stream, parts, biases, norm_weights, norm_biases, arrived,
            layer, place - HEADS, first, steps, scale,
            LAYERS, WIDTH, BLOCK_WIDTH, HEADS, HEAD, BLOCK_HEAD, SPLITS, CELLS,
            False, MASKED, MOST, BLOCK_MOST, PRE, EPS, BLOCK,
        )  # fmt: skip
    else:
        _feed_forward_stages(
            expand_weight, expand_bias, contract_weight,
            stream, parts, biases, norm_weights, norm_biases, arrived,
            layer, place - 2 * HEADS, first, steps,
            WIDTH, BLOCK_WIDTH, HEADS, HIDDEN, BLOCK_HIDDEN, MOST, BLOCK_MOST, PRE, EPS,
        )  # fmt: skip


def fits(decoder: Decoder, device: torch.device) -> bool:
    """Return whether all programs run at once: each on a processor of its own."""
    if device.type != "cuda":  # in the interpreter, which takes turns
        return True
    return _num_programs(decoder) <= torch.cuda.get_device_properties(device).multi_processor_count


def _num_programs(decoder: Decoder) -> int:
    layers = cast(list[Layer], list(decoder.layers))
    splits = math.ceil(layers[0].expand.out_features / _SPLIT)
    return len(layers) * (2 * layers[0].self_attention.heads + splits) + 1


class ResidentSteps:
    """The tensors of a reading of one row, and its kernel.

    Args:
        end: token that ends a reading; -1 for none.
        length: tokens of a reading at most, start and end included.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        cells: int,
        masked: bool,
        length: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers = cast(list[Layer], list(decoder.layers))
        heads, hidden = layers[0].self_attention.heads, layers[0].expand.out_features
        width, depth, head = decoder.width, len(layers), decoder.width // heads
        splits = math.ceil(hidden / _SPLIT)
        self._end, self._length, self._device = end, length, device
        self._scale, self._root = head**-0.5, math.sqrt(width)
        self._programs = _num_programs(decoder)
        self._weights = [(now(decoder).to(device, kind or dtype), now) for now, kind in _WEIGHTS]
        most = max(heads, splits)
        with torch.device(device):
            self._pasts = torch.zeros(depth, 2, heads, length, head, dtype=dtype)
            self._crosses = torch.zeros(depth, 2, heads, cells, head, dtype=dtype)
            self._mask = torch.zeros(cells, dtype=torch.bool)
            self._stream = torch.zeros(3 * depth + 1, width)
            self._parts = torch.zeros(3 * depth, most, width)
            self._arrived = torch.zeros(3 * depth + 1, dtype=torch.int32)
            self._written = torch.zeros(1, length, dtype=torch.int64)
            self._scores = torch.zeros(1, length)
        self._constants = {
            "LAYERS": depth,
            "WIDTH": width,
            "BLOCK_WIDTH": _power(width),
            "HEADS": heads,
            "HEAD": head,
            "BLOCK_HEAD": _power(head),
            "HIDDEN": hidden,
            "BLOCK_HIDDEN": min(_SPLIT, _power(hidden)),
            "SPLITS": splits,
            "TOKENS": decoder.embedding.num_embeddings,
            "BLOCK_TOKENS": _power(decoder.embedding.num_embeddings),
            "LENGTH": length,
            "CELLS": cells,
            "MASKED": masked,
            "MOST": most,
            "BLOCK_MOST": _power(most),
            "PRE": layers[0].pre,
            "EPS": cast(nn.LayerNorm, layers[0].norms[0]).eps,
        }

    def read(
        self,
        decoder: Decoder,
        memory: Float[Tensor, "1 M D"],
        memory_mask: Bool[Tensor, "1 M"] | None,
        *,
        start: int,
        pad: int,
    ) -> tuple[Int[Tensor, "1 L"], Float[Tensor, "1 L"]]:
        """Return the likeliest token of each step and its log-probability, with pad behind the end."""
        weights = [weight for weight, _ in self._weights]
        torch._foreach_copy_(weights, [now(decoder) for _, now in self._weights])
        for layer, cross in zip(decoder.layers, self._crosses, strict=True):
            cross.copy_(cast(Layer, layer).cross_attention.keys_values(memory)[:, 0])
        if memory_mask is not None:
            self._mask.copy_(memory_mask[0])
        begun = decoder.embedding.weight[start] * self._root + decoder.positions[0]
        self._stream[0].copy_(begun)
        self._written.fill_(pad)
        for tensor in (self._scores, self._arrived):
            tensor.zero_()
        on_gpu = self._device.type == "cuda"
        together = self._length - 1 if on_gpu else 1
        for first in range(0, self._length - 1, together):
            if not on_gpu and int(self._arrived[-1]) >= _ENDED.value:
                break
            _read[(self._programs,)](
                *weights, self._pasts, self._crosses, self._mask, self._stream, self._parts,
                self._arrived, self._written, self._scores,
                first, together, self._scale, self._root, self._end, self._length - 2,
                **self._constants, **_LAUNCH, **({"launch_cooperative_grid": True} if on_gpu else {}),
            )  # fmt: skip
        return self._written, self._scores


def _stacked(*names: str) -> Callable[[Decoder], Tensor]:
    """Return what stacks tensors of all layers; those of several names lie one under the other."""

    def now(decoder: Decoder) -> Tensor:
        rows: list[list[Tensor]] = [
            [layer.get_parameter(name) for name in names] for layer in decoder.layers
        ]
        return torch.stack([torch.cat(parts) for parts in rows])

    return now


def _by_stage(kind: str) -> Callable[[Decoder], Tensor]:
    """Return what stacks the norms' weights or biases in the order of the stages, the last norm behind."""

    def now(decoder: Decoder) -> Tensor:
        layers = cast(list[Layer], list(decoder.layers))
        norms = [cast(nn.LayerNorm, norm) for layer in layers for norm in layer.norms]
        last = decoder.norm if isinstance(decoder.norm, nn.LayerNorm) else norms[-1]
        return torch.stack([norm.get_parameter(kind) for norm in (*norms, last)])

    return now


def _update_biases(decoder: Decoder) -> Tensor:
    """Return what each stage's update has beside its parts."""
    names = ("self_attention.out.bias", "cross_attention.out.bias", "contract.bias")
    return torch.stack([layer.get_parameter(n) for layer in decoder.layers for n in names])


_FULL = torch.float32

_WEIGHTS: tuple[tuple[Callable[[Decoder], Tensor], torch.dtype | None], ...] = (
    (_stacked("self_attention.query.weight", "self_attention.key_value.weight"), None),
    (_stacked("self_attention.query.bias", "self_attention.key_value.bias"), _FULL),
    (_stacked("self_attention.out.weight"), None),
    (_stacked("cross_attention.query.weight"), None),
    (_stacked("cross_attention.query.bias"), _FULL),
    (_stacked("cross_attention.out.weight"), None),
    (_stacked("expand.weight"), None),
    (_stacked("expand.bias"), _FULL),
    (_stacked("contract.weight"), None),
    (_update_biases, _FULL),
    (_by_stage("weight"), _FULL),
    (_by_stage("bias"), _FULL),
    (
        lambda d: d.get_parameter("embedding.weight" if d.read_out is None else "read_out.weight"),
        None,
    ),
    (lambda d: d.get_parameter("bias"), _FULL),
    (lambda d: d.get_parameter("embedding.weight"), None),
    (lambda d: d.get_buffer("positions"), _FULL),
)
"""What the kernel takes first, in its order: made of a decoder; None is in the precision of reading."""


def _power(number: int) -> int:
    return triton.next_power_of_2(max(1, number))
