"""Greedy reading on a GPU: the steps of the decoder in fixed tensors, recorded once as a CUDA graph.

Run one by one, a step's kernels are launched far slower than the card computes them. Here they are
recorded for a number of rows and memory cells, kept, and replayed for each reading of that size.
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paragraph_ocr.cuda_graph import recording
from paragraph_ocr.model import kernels
from paragraph_ocr.model.decoder import Decoder, Layer

FUSED_ROWS = 32
"""Rows up to which each multiplies by the weights itself; for more, cuBLAS is faster."""

_LARGEST_TILE = 2**14
"""Weights of a head's projection that a program holds in its registers beside three others."""

_ATTENTION = {"BLOCK": 512, "num_warps": 8}
_ATTEND = {"BLOCK": 128, "num_warps": 2}
_FEED_FORWARD = {"num_warps": 4}
"""Cells looked at together and warps of a program, the fastest of some tried on an H100."""

_STEPS_A_GRAPH = 16
"""Steps recorded as one graph: after each, the ended rows are looked at."""

_KEPT = 4
"""Recorded sizes kept for a decoder."""

_SPLIT = 64
"""Hidden units that one program of a feed-forward block computes."""


class Size(NamedTuple):
    """What a recording is for."""

    rows: int
    cells: int
    masked: bool
    length: int  # tokens of a reading at most, start and end included
    end: int  # token that ends a reading; -1 for none
    dtype: torch.dtype
    device: torch.device


_recorded: WeakKeyDictionary[Decoder, OrderedDict[Size, "Steps"]] = WeakKeyDictionary()


def read_greedily(
    decoder: Decoder,
    memory: Float[Tensor, "B M D"],
    memory_mask: Bool[Tensor, "B M"] | None,
    *,
    start: int,
    end: int | None,
    pad: int,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each step and its log-probability, each "B max_length".

    Args:
        end: the token that ends a row; None goes on to the maximum length whatever is written.
        pad: what is written after the end.
    """
    device, autocast = memory.device, torch.is_autocast_enabled(memory.device.type)
    size = Size(
        rows=2 ** math.ceil(math.log2(len(memory))),
        cells=memory.shape[1],
        masked=memory_mask is not None,
        length=max_length,
        end=-1 if end is None else end,
        dtype=torch.get_autocast_dtype(device.type) if autocast else memory.dtype,
        device=device,
    )
    recorded = _recorded.setdefault(decoder, OrderedDict())
    # a recording made under inference mode could not be replayed outside it
    with torch.inference_mode(False), torch.no_grad():
        if size not in recorded:
            while len(recorded) >= _KEPT:
                recorded.popitem(last=False)
            recorded[size] = Steps(decoder, size)
        recorded.move_to_end(size)
        return recorded[size].read(decoder, memory, memory_mask, start=start, pad=pad)


def _fits_registers(decoder: Decoder) -> bool:
    """Return whether a program can hold a head's projections."""
    heads = cast(Layer, decoder.layers[0]).self_attention.heads
    return _power(decoder.width) * _power(decoder.width // heads) <= _LARGEST_TILE


class Steps:
    """The tensors of a reading of some size, and the graph of its steps."""

    def __init__(self, decoder: Decoder, size: Size) -> None:
        self.size = size
        layers = cast(list[Layer], list(decoder.layers))
        attention = layers[0].self_attention
        width, heads, hidden = decoder.width, attention.heads, layers[0].expand.out_features
        self._width, self._heads, self._hidden = width, heads, hidden
        self._pre = layers[0].pre
        self._norms_eps = cast(nn.LayerNorm, layers[0].norms[0]).eps
        self._fused = size.rows <= FUSED_ROWS and _fits_registers(decoder)
        hopper = (
            size.device.type == "cuda" and torch.cuda.get_device_capability(size.device)[0] >= 9
        )
        ahead = self._fused and hopper
        self._ahead = {"AHEAD": True, "launch_pdl": True} if ahead else {"AHEAD": False}
        self._splits = math.ceil(hidden / _SPLIT) if self._fused else 1
        self._weights = _Weights(decoder, size)
        rows, head = size.rows, width // heads
        parts = max(heads, self._splits) if self._fused else 1
        with torch.device(size.device):
            self._pasts = [
                torch.zeros(2, rows, heads, size.length, head, dtype=size.dtype) for _ in layers
            ]
            self._crosses = [
                torch.zeros(2, rows, heads, size.cells, head, dtype=size.dtype) for _ in layers
            ]
            self._mask = torch.zeros(rows, size.cells, dtype=torch.bool)
            self._states = [torch.zeros(rows, width) for _ in range(2)]
            self._parts = [torch.zeros(rows, parts, width) for _ in range(2)]
            self._positions = torch.zeros(rows, dtype=torch.int32)
            self._ended = torch.ones(rows, dtype=torch.int32)
            self._written = torch.zeros(rows, size.length, dtype=torch.int64)
            self._scores = torch.zeros(rows, size.length)
        self._graph: torch.cuda.CUDAGraph | None = None

    def read(
        self,
        decoder: Decoder,
        memory: Float[Tensor, "B M D"],
        memory_mask: Bool[Tensor, "B M"] | None,
        *,
        start: int,
        pad: int,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and scores of each row, as `read_greedily`."""
        rows = len(memory)
        self._weights.renew(decoder)
        for layer, cross in zip(decoder.layers, self._crosses, strict=True):
            layer = cast(Layer, layer)
            cross[:, :rows] = layer.cross_attention.keys_values(memory)
        if memory_mask is not None:
            self._mask[:rows] = memory_mask
        with torch.autocast(self.size.device.type, enabled=False):
            if self.size.device.type == "cuda" and self._graph is None:
                self._record()
            self._begin(rows, start, pad)
            self._go_through()
        return self._written[:rows], self._scores[:rows]

    def _begin(self, rows: int, start: int, pad: int) -> None:
        weights = self._weights
        begun = weights.embedding[start].float() * math.sqrt(self._width) + weights.codes[0]
        self._states[0].copy_(begun.expand_as(self._states[0]))
        self._written.fill_(pad)
        self._scores.zero_()
        self._positions.zero_()
        self._ended.fill_(1)
        self._ended[:rows] = 0

    def _go_through(self) -> None:
        """Step until every row has ended, looking back at it one graph later: nothing waits for an answer."""
        looks: list[tuple[Tensor, torch.cuda.Event]] = []
        for _ in range(math.ceil((self.size.length - 1) / _STEPS_A_GRAPH)):
            if self._graph is None:
                for _ in range(_STEPS_A_GRAPH):
                    self._step()
            else:
                self._graph.replay()
            if self.size.end < 0:
                continue
            if self._graph is None:
                if bool(self._ended.all()):
                    return
                continue
            all_ended = torch.empty(1, dtype=torch.bool, pin_memory=True)
            all_ended.copy_(self._ended.all()[None], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            looks.append((all_ended, event))
            if len(looks) > 1:
                looks[-2][1].synchronize()
                if bool(looks[-2][0]):
                    return

    def _record(self) -> None:
        """Record some steps, with no row to read."""
        stream = torch.cuda.Stream(self.size.device)
        stream.wait_stream(torch.cuda.current_stream(self.size.device))
        with torch.cuda.stream(stream):
            self._step()  # compiles the kernels, and has cuBLAS take its memory
        torch.cuda.current_stream(self.size.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph):
            for _ in range(_STEPS_A_GRAPH):
                self._step()

    def _step(self) -> None:
        """Write each row's next token."""
        weights, stream = self._weights, _Stream(self._states, self._parts)
        attention = self._fused_attention if self._fused else self._attention
        feed_forward = self._fused_feed_forward if self._fused else self._feed_forward
        for index, layer in enumerate(weights.layers):
            attention(stream, layer.norms[0], layer.own, self._pasts[index], own=True)
            attention(stream, layer.norms[1], layer.cross, self._crosses[index], own=False)
            feed_forward(stream, layer.norms[2], layer)
        norm = weights.norm or stream.after
        assert norm is not None
        kernels.read_out[(self.size.rows,)](
            stream.states, self._states[0], stream.parts, stream.bias, *norm,
            weights.read_out, weights.bias, weights.embedding, weights.codes,
            self._positions, self._ended, self._written, self._scores,
            math.sqrt(self._width), self.size.end, self.size.length - 2,
            **self._widths(stream), TOKENS=len(weights.read_out),
            BLOCK_TOKENS=min(128, _power(len(weights.read_out))), LENGTH=self.size.length,
            EPS=self._norms_eps, num_warps=8, **self._ahead,
        )  # fmt: skip

    def _widths(self, stream: "_Stream") -> dict[str, int]:
        parts = stream.num_parts
        return {
            "WIDTH": self._width,
            "BLOCK_WIDTH": _power(self._width),
            "PARTS": parts,
            "BLOCK_PARTS": _power(parts),
        }

    def _norm(self, stream: "_Stream", before: "Norm") -> "Norm":
        """Return the norm that gives a block its inputs: its own, or that of the block before it."""
        return before if self._pre or stream.after is None else stream.after

    def _fused_attention(
        self, stream: "_Stream", norm: "Norm", weights: "Projections", cache: Tensor, *, own: bool
    ) -> None:
        head = self._width // self._heads
        kernels.attention_block[(self.size.rows, self._heads)](
            stream.states, stream.next_states, stream.parts, stream.bias, *self._norm(stream, norm),
            weights.weight, weights.bias, cache[0], cache[1], self._mask, self._positions, self._ended,
            weights.out_weight, stream.next_parts, head**-0.5,
            **self._widths(stream), HEADS=self._heads, HEAD=head, BLOCK_HEAD=_power(head),
            CELLS=cache.shape[3], SELF=own, MASKED=self.size.masked and not own, PRE=self._pre,
            EPS=self._norms_eps, **_ATTENTION, **self._ahead,
        )  # fmt: skip
        stream.advance(self._heads, weights.out_bias, norm)

    def _fused_feed_forward(self, stream: "_Stream", norm: "Norm", layer: "LayerWeights") -> None:
        kernels.feed_forward_block[(self.size.rows, self._splits)](
            stream.states, stream.next_states, stream.parts, stream.bias, *self._norm(stream, norm),
            layer.expand_weight, layer.expand_bias, self._ended, layer.contract_weight,
            stream.next_parts,
            **self._widths(stream), HIDDEN=self._hidden,
            BLOCK_HIDDEN=min(_SPLIT, _power(self._hidden)), PRE=self._pre, EPS=self._norms_eps,
            **_FEED_FORWARD, **self._ahead,
        )  # fmt: skip
        stream.advance(self._splits, layer.contract_bias, norm)

    def _attention(
        self, stream: "_Stream", norm: "Norm", weights: "Projections", cache: Tensor, *, own: bool
    ) -> None:
        inputs = self._join(stream, norm)
        projected = F.linear(inputs, weights.weight, weights.bias.to(inputs.dtype))
        head, gathered = self._width // self._heads, torch.empty_like(inputs)
        kernels.attend[(self.size.rows, self._heads)](
            projected, cache[0], cache[1], self._mask, self._positions, self._ended, gathered,
            head**-0.5,
            WIDTH=self._width, HEADS=self._heads, HEAD=head, BLOCK_HEAD=_power(head),
            CELLS=cache.shape[3], SELF=own, MASKED=self.size.masked and not own,
            **_ATTEND,
        )  # fmt: skip
        stream.replace(F.linear(gathered, weights.out_weight), weights.out_bias, norm)

    def _feed_forward(self, stream: "_Stream", norm: "Norm", layer: "LayerWeights") -> None:
        inputs = self._join(stream, norm)
        hidden = torch.relu_(
            F.linear(inputs, layer.expand_weight, layer.expand_bias.to(inputs.dtype))
        )
        stream.replace(F.linear(hidden, layer.contract_weight), layer.contract_bias, norm)

    def _join(self, stream: "_Stream", norm: "Norm") -> Tensor:
        inputs = torch.empty(
            self.size.rows, self._width, device=self.size.device, dtype=self.size.dtype
        )
        kernels.join[(self.size.rows,)](
            stream.states, stream.next_states, stream.parts, stream.bias, *self._norm(stream, norm),
            self._ended, inputs,
            **self._widths(stream), PRE=self._pre, EPS=self._norms_eps, num_warps=2,
        )  # fmt: skip
        return inputs


class _Stream:
    """The residual stream on its way through a step: states, and the parts of the last update."""

    def __init__(self, states: list[Tensor], parts: list[Tensor]) -> None:
        self._states, self._parts = states, parts
        self.states, self.next_states = states
        self.parts, self.next_parts = parts
        self.num_parts = 0
        self.bias: Tensor = parts[0]  # of no consequence while there are no parts
        self.after: Norm | None = None

    def advance(self, num_parts: int, bias: Tensor, norm: "Norm") -> None:
        """Go behind a block that has written its update into `next_parts`."""
        self.replace(self.next_parts, bias, norm)
        self.num_parts = num_parts
        self._parts = self._parts[::-1]
        self.parts, self.next_parts = self._parts

    def replace(self, update: Tensor, bias: Tensor, norm: "Norm") -> None:
        """Go behind a block that has given its update in one part."""
        self.states, self.next_states = self.next_states, self.states
        self.parts, self.num_parts, self.bias, self.after = update, 1, bias, norm


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor


class Projections(NamedTuple):
    weight: Tensor  # to queries, and in self-attention keys and values
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


class LayerWeights(NamedTuple):
    norms: list[Norm]
    own: Projections
    cross: Projections
    expand_weight: Tensor
    expand_bias: Tensor
    contract_weight: Tensor
    contract_bias: Tensor


class _Weights:
    """A copy of a decoder's weights as the kernels want them, in tensors that stay where they are.

    The decoder itself is not kept: it could not be forgotten then.
    """

    def __init__(self, decoder: Decoder, size: Size) -> None:
        self._size = size
        self._copies: list[tuple[Tensor, Callable[[Decoder], Tensor]]] = []
        norm, read_out = decoder.norm, decoder.read_out
        self.layers = [self._layer(decoder, index) for index in range(len(decoder.layers))]
        self.norm = self._norm(decoder, "norm") if isinstance(norm, nn.LayerNorm) else None
        self.embedding = self._matrix(decoder, "embedding.weight")
        self.read_out = (
            self.embedding if read_out is None else self._matrix(decoder, "read_out.weight")
        )
        self.bias = self._vector(decoder, "bias")
        self.codes = self._vector(decoder, "positions")

    def renew(self, decoder: Decoder) -> None:
        """Copy the weights again: a learner may have changed them."""
        torch._foreach_copy_(
            [copy for copy, _ in self._copies], [now(decoder) for _, now in self._copies]
        )

    def _matrix(self, decoder: Decoder, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the copy of a tensor, or of several one under the other."""

        def now(decoder: Decoder) -> Tensor:
            found = [operator.attrgetter(name)(decoder).detach() for name in names]
            return found[0] if len(found) == 1 else torch.cat(found)

        copy = now(decoder).to(self._size.device, dtype or self._size.dtype, copy=True)
        self._copies.append((copy.contiguous(), now))
        return self._copies[-1][0]

    def _vector(self, decoder: Decoder, *names: str) -> Tensor:
        return self._matrix(decoder, *names, dtype=torch.float32)

    def _norm(self, decoder: Decoder, name: str) -> Norm:
        return Norm(self._vector(decoder, f"{name}.weight"), self._vector(decoder, f"{name}.bias"))

    def _layer(self, decoder: Decoder, index: int) -> LayerWeights:
        layer = f"layers.{index}."
        own, cross = (f"{layer}{name}_attention." for name in ("self", "cross"))

        def projections(part: str, *inputs: str) -> Projections:
            return Projections(
                self._matrix(decoder, *(f"{part}{name}.weight" for name in inputs)),
                self._vector(decoder, *(f"{part}{name}.bias" for name in inputs)),
                self._matrix(decoder, f"{part}out.weight"),
                self._vector(decoder, f"{part}out.bias"),
            )

        return LayerWeights(
            norms=[self._norm(decoder, f"{layer}norms.{block}") for block in range(3)],
            own=projections(own, "query", "key_value"),
            cross=projections(cross, "query"),
            expand_weight=self._matrix(decoder, f"{layer}expand.weight"),
            expand_bias=self._vector(decoder, f"{layer}expand.bias"),
            contract_weight=self._matrix(decoder, f"{layer}contract.weight"),
            contract_bias=self._vector(decoder, f"{layer}contract.bias"),
        )


def _power(number: int) -> int:
    return triton.next_power_of_2(max(1, number))
