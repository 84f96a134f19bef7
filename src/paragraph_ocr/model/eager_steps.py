"""Greedy reading by PyTorch's own operations, as few as can be: on a CPU, and on a GPU without Triton.

For few rows a step computes little. It waits for its weights to come from the CPU's last cache, and for
PyTorch to find the next operation. So weights lie in the order in which they are read, two threads fetch
half of them each, and the queries' scale and the embedding's are multiplied in before.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paragraph_ocr.model.decoder import Attention, Decoder, Layer

_FEW_ROWS = 4
"""Rows up to which more than two threads would wait for each other longer than they compute."""

_PARTS = 2
"""Parts that a product is computed in, a thread each; four were no faster on two cores."""

_STALL_S = 2e-3
"""Longer than any product of few rows (10 to 100 us): a thread waited for has lost its core to others."""

_STEPS_ALONE = 32
"""Steps by one thread after a stall; twice as many after each further one."""


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
    device, count = memory.device, len(memory)
    if torch.is_autocast_enabled(device.type):
        memory = memory.to(torch.get_autocast_dtype(device.type))
    written = torch.full((count, max_length - 1), pad, device=device)
    scores = torch.zeros(count, max_length - 1, device=device)
    threads = _Threads(watched=device.type == "cpu" and count <= _FEW_ROWS)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), threads:
        steps = _Steps(decoder, memory, memory_mask, max_length, threads)
        rows = torch.arange(count, device=device)
        tokens = torch.full_like(rows, start)
        for step in range(max_length - 1):
            threads.begin_step()
            best, tokens = steps.next(tokens)
            scores.select(1, step).index_copy_(0, rows, best)
            written.select(1, step).index_copy_(0, rows, tokens)
            if end is None or end not in tokens.tolist():
                continue
            going = (tokens != end).nonzero()[:, 0]
            if len(going) == 0:
                break
            steps.keep(going)
            rows, tokens = rows[going], tokens[going]
    return written, scores


class _Threads:
    """Two threads for few rows, and one for some steps after they had to wait for each other.

    They meet a hundred times a step. Where another process has a core, each meeting takes until that
    process's turn is over, some 8 ms. One thread and two agree up to rounding, so where only deterministic
    algorithms are allowed there is one.

    Args:
        watched: the rows are few; otherwise threads are left as they are.
    """

    def __init__(self, *, watched: bool) -> None:
        self._watched = watched
        self._before = torch.get_num_threads()
        alone = torch.are_deterministic_algorithms_enabled()
        self._together = 1 if alone else min(self._before, _PARTS)
        self._alone, self._steps_alone, self._next_alone = False, 0, _STEPS_ALONE

    def __enter__(self) -> None:
        if self._watched:
            torch.set_num_threads(self._together)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)

    def begin_step(self) -> None:
        if self._steps_alone:
            self._steps_alone -= 1
        elif self._alone:
            self._alone = False
            torch.set_num_threads(self._together)

    def note(self, seconds: float) -> None:
        """Take what a product took."""
        if seconds > _STALL_S and self._watched and not self._alone:
            self._alone = True
            torch.set_num_threads(1)
            self._steps_alone, self._next_alone = self._next_alone, 2 * self._next_alone


class _Product:
    """Linear layers of the same inputs, their weights "parts in out/parts"."""

    def __init__(
        self, weights: list[Tensor], biases: list[Tensor], like: Tensor, threads: _Threads
    ) -> None:
        weight, bias = torch.cat(weights).to(like.dtype), torch.cat(biases).to(like.dtype)
        self._threads = threads
        self._parts = _PARTS if len(bias) % _PARTS == 0 else 1
        self._weight = weight.unflatten(0, (self._parts, -1)).transpose(1, 2).contiguous()
        self._bias = bias.view(self._parts, 1, -1)
        self.make_room(like)

    def make_room(self, like: Float[Tensor, "B ..."]) -> None:
        """Have outputs for as many rows."""
        self.out = like.new_empty(len(like), self._bias.numel())
        self._out = self.out.unflatten(1, (self._parts, -1)).transpose(0, 1)

    def __call__(self, inputs: Float[Tensor, "B in"]) -> Float[Tensor, "B out"]:
        """Return the outputs, in the tensor of the last call."""
        began = time.perf_counter()
        torch.baddbmm(self._bias, inputs.expand(self._parts, -1, -1), self._weight, out=self._out)
        self._threads.note(time.perf_counter() - began)
        return self.out


_Norm = tuple[tuple[int, ...], Tensor, Tensor, float]
"""What torch.layer_norm takes after its input; by name it would take longer."""


class _LayerSteps(NamedTuple):
    norms: list[_Norm]
    own: _Product  # to queries, keys and values
    own_out: _Product
    cross: _Product  # to queries
    cross_out: _Product
    expand: _Product
    contract: _Product


class _Steps:
    """Weights and caches of one reading, laid out anew for each: training may have changed them."""

    def __init__(
        self,
        decoder: Decoder,
        memory: Float[Tensor, "B M D"],
        mask: Bool[Tensor, "B M"] | None,
        max_length: int,
        threads: _Threads,
    ) -> None:
        layers = cast(list[Layer], list(decoder.layers))
        self._pre, self._heads = layers[0].pre, layers[0].self_attention.heads
        self._width, self._head = decoder.width, decoder.width // self._heads
        self._dtype = memory.dtype
        product = partial(_Product, like=memory, threads=threads)
        self._layers = [self._laid_out(layer, product) for layer in layers]
        self._embedding = decoder.embedding.weight * math.sqrt(decoder.width)
        self._codes = decoder.positions
        self._norm = _norm(decoder.norm) if isinstance(decoder.norm, nn.LayerNorm) else None
        read_out = decoder.embedding if decoder.read_out is None else decoder.read_out
        self._read_out = product([cast(Tensor, read_out.weight)], [decoder.bias])
        self._hidden_scores = None  # of cells beyond the page, minus infinity
        if mask is not None:
            unseen = torch.zeros_like(mask, dtype=memory.dtype).masked_fill(~mask, -math.inf)
            self._hidden_scores = unseen.repeat_interleave(self._heads, dim=0)[:, None]
        self._length = 0
        self._crosses = [self._cross(layer.cross_attention, memory) for layer in layers]
        shape = (2, len(layers), len(memory), self._heads, max_length, self._head)
        self._pasts = memory.new_empty(shape)
        self._make_room(memory)

    def _laid_out(self, layer: Layer, product: Callable[..., _Product]) -> _LayerSteps:
        own, cross = layer.self_attention, layer.cross_attention
        scale = self._head**-0.5  # of queries times keys
        return _LayerSteps(
            norms=[_norm(cast(nn.LayerNorm, norm)) for norm in layer.norms],
            own=product(
                [own.query.weight * scale, own.key_value.weight],
                [own.query.bias * scale, own.key_value.bias],
            ),
            own_out=product([own.out.weight], [own.out.bias]),
            cross=product([cross.query.weight * scale], [cross.query.bias * scale]),
            cross_out=product([cross.out.weight], [cross.out.bias]),
            expand=product([layer.expand.weight], [layer.expand.bias]),
            contract=product([layer.contract.weight], [layer.contract.bias]),
        )

    def _cross(
        self, attention: Attention, memory: Float[Tensor, "B M D"]
    ) -> tuple[Float[Tensor, "B heads d M"], Float[Tensor, "B heads M d"]]:
        """Return keys and values of the memory, as their products read them."""
        linear = attention.key_value
        weight, bias = linear.weight.to(self._dtype), linear.bias.to(self._dtype)
        projected = torch.nn.functional.linear(memory, weight, bias)
        keys, values = projected.unflatten(-1, (2, self._heads, -1)).permute(2, 0, 3, 1, 4)
        return keys.transpose(2, 3).contiguous(), values.contiguous()

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""
        self._crosses = [(keys[rows], values[rows]) for keys, values in self._crosses]
        self._pasts = self._pasts.index_select(2, rows)
        if self._hidden_scores is not None:
            unseen = self._hidden_scores.unflatten(0, (-1, self._heads))
            self._hidden_scores = unseen[rows].flatten(0, 1)
        like = self._crosses[0][0]
        for product in (self._read_out, *(part for layer in self._layers for part in layer[1:])):
            cast(_Product, product).make_room(like)
        self._make_room(like)

    def _make_room(self, like: Float[Tensor, "B ..."]) -> None:
        """Have tensors for as many rows; rows and heads are one dimension where attention sees them."""
        by_head = (-1, 1, self._head)
        self._queries, self._gathered = like.new_empty(2, len(like), self._width)
        self._own_queries, self._attended = (
            rows.view(by_head) for rows in (self._queries, self._gathered)
        )
        self._keys = self._pasts[0].flatten(1, 2).transpose(2, 3)
        self._values = self._pasts[1].flatten(1, 2)
        self._memories = [
            (layer.cross.out.view(by_head), keys.flatten(0, 1), values.flatten(0, 1))
            for layer, (keys, values) in zip(self._layers, self._crosses, strict=True)
        ]
        self._projected = [self._split(layer.own.out) for layer in self._layers]

    def _split(
        self, projected: Float[Tensor, "B E"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "2 B heads d"]]:
        """Return queries, and keys with values, of a product's outputs."""
        keys_values = projected[:, self._width :].unflatten(1, (2, self._heads, self._head))
        return projected[:, : self._width], keys_values.transpose(0, 1)

    def next(self, tokens: Int[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """Return the log-probability of the likeliest token after `tokens`, and that token."""
        states = self._embedding.index_select(0, tokens).add_(self._codes[self._length])
        newest = self._pasts[..., self._length, :].unbind(1)
        self._length += 1
        keys = self._keys[..., : self._length].unbind(0)
        values = self._values[:, :, : self._length].unbind(0)
        for index, layer in enumerate(self._layers):
            layer.own(self._inputs(states, layer.norms[0]))
            own_queries, own_keys_values = self._projected[index]
            newest[index].copy_(own_keys_values)
            self._queries.copy_(own_queries)
            self._attend(self._own_queries, keys[index], values[index], None)
            states = self._join(states, layer.own_out(self._gathered), layer.norms[0])

            layer.cross(self._inputs(states, layer.norms[1]))
            self._attend(*self._memories[index], self._hidden_scores)
            states = self._join(states, layer.cross_out(self._gathered), layer.norms[1])

            hidden = layer.expand(self._inputs(states, layer.norms[2])).relu_()
            states = self._join(states, layer.contract(hidden), layer.norms[2])
        last = states if self._norm is None else torch.layer_norm(states, *self._norm)
        logs = self._read_out(last.to(self._dtype)).float().log_softmax(dim=-1)
        best, likeliest = logs.max(dim=-1)
        return best, likeliest

    def _inputs(self, states: Tensor, norm: _Norm) -> Tensor:
        inputs = torch.layer_norm(states, *norm) if self._pre else states
        return inputs if inputs.dtype == self._dtype else inputs.to(self._dtype)

    def _join(self, states: Tensor, update: Tensor, norm: _Norm) -> Tensor:
        total = states + update
        return total if self._pre else torch.layer_norm(total, *norm)

    def _attend(
        self,
        queries: Float[Tensor, "N 1 d"],
        keys: Float[Tensor, "N d M"],
        values: Float[Tensor, "N M d"],
        hidden_scores: Float[Tensor, "N 1 M"] | None,
    ) -> None:
        """Put what each head of each row gathers into `_gathered`."""
        if hidden_scores is None:
            scores = torch.bmm(queries, keys)
        else:
            scores = torch.baddbmm(hidden_scores, queries, keys)
        torch.bmm(scores.softmax(dim=-1), values, out=self._attended)


def _norm(norm: nn.LayerNorm) -> _Norm:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps
