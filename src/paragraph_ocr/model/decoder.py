"""The Transformer decoder: all positions at once to train, one cached step at a time to read."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paragraph_ocr.model.positions import sine_code


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected apart, so that they can be kept."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, states: Float[Tensor, "B M D"]) -> Float[Tensor, "2 B heads M d"]:
        return self.key_value(states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(
        self,
        states: Float[Tensor, "B L D"],
        keys_values: Float[Tensor, "2 B heads M d"],
        *,
        mask: Bool[Tensor, "B 1 1 M"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B L D"]:
        """Return what each state gathers; `mask` is true where a key may be seen."""
        queries = self.query(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        gathered = F.scaled_dot_product_attention(
            queries,
            keys_values[0],
            keys_values[1],
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.out(gathered.transpose(1, 2).flatten(2))

    def first_scores(
        self,
        states: Float[Tensor, "B L D"],
        keys_values: Float[Tensor, "2 B heads M d"],
        *,
        mask: Bool[Tensor, "B 1 1 M"] | None = None,
    ) -> Float[Tensor, "B L M"]:
        """Return what the first head's weights are the softmax of."""
        keys = keys_values[0, :, 0]
        width = keys.shape[2]
        queries = F.linear(states, self.query.weight[:width], self.query.bias[:width])
        scores = queries @ keys.transpose(1, 2) / math.sqrt(width)
        return scores if mask is None else scores.masked_fill(~mask[:, 0], -torch.inf)


class Layer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a residual and a LayerNorm.

    The norm stands before each block (pre: trains without a long warm-up) or after the sum (post:
    Vaswani et al. 2017).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        norm: Literal["pre", "post"],
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.expand = nn.Linear(width, feed_forward)
        self.contract = nn.Linear(feed_forward, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        states: Float[Tensor, "B L D"],
        memory: Float[Tensor, "2 pages heads M d"],
        memory_mask: Bool[Tensor, "pages 1 1 M"] | None,
        extend: Callable[[Tensor], Tensor] | None = None,
        sharing: int = 1,
        scores: list[Tensor] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Return the states of the next layer.

        Args:
            memory: this layer's cross-attention keys and values.
            sharing: rows that follow one another and look at one page; the memory has each page once.
            extend: puts the only state's keys and values "2 B heads 1 d" into this layer's cache and
                returns all so far; None sees all states at once under the causal mask.
            scores: takes those of the cross-attention's first head.
        """
        residual = states
        inputs = self.norms[0](states) if self.pre else states
        keys_values = self.self_attention.keys_values(inputs)
        if extend is not None:
            keys_values = extend(keys_values)
        gathered = self.self_attention(inputs, keys_values, causal=extend is None)
        states = self._join(residual, gathered, 0)

        residual = states
        inputs = self.norms[1](states) if self.pre else states
        if sharing > 1:  # to a page their states are those of one longer row
            inputs = inputs.reshape(-1, sharing, inputs.shape[2])
        if scores is not None:
            scores.append(self.cross_attention.first_scores(inputs, memory, mask=memory_mask))
        gathered = self.cross_attention(inputs, memory, mask=memory_mask)
        if sharing > 1:
            gathered = gathered.reshape(residual.shape)
        states = self._join(residual, gathered, 1)

        residual = states
        inputs = self.norms[2](states) if self.pre else states
        hidden = self.contract(self.dropout(F.relu(self.expand(inputs))))
        return self._join(residual, hidden, 2)

    def _join(self, residual: Tensor, update: Tensor, block: int) -> Tensor:
        total = residual + self.dropout(update)
        return total if self.pre else self.norms[block](total)


class Decoder(nn.Module):
    """Token embeddings, fixed sine positions, layers, and the read-out to logits.

    Args:
        norm: "pre" or "post"; pre-norm ends in one more LayerNorm.
        tied: the read-out uses the embedding's weights.
        max_length: positions at most, start and end included.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        depth: int,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        norm: Literal["pre", "post"],
        tied: bool,
        max_length: int,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(num_tokens, width)
        self.layers = nn.ModuleList(
            Layer(width, heads, feed_forward, dropout, norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(num_tokens))
        self.read_out = None if tied else nn.Linear(width, num_tokens, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sine_code(max_length, width), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier matrices, zero biases; embeddings of unit size once scaled by sqrt(width)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.width**-0.5)

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        memory: Float[Tensor, "B M D"],
        memory_mask: Bool[Tensor, "B M"] | None = None,
        scores: list[Tensor] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Return the logits of the token after each of `tokens` (teacher forcing).

        Args:
            memory_mask: true where a memory cell may be seen; None sees all.
            scores: takes those of each layer's first head that looks at the memory, "B L M" before softmax.
        """
        states = self._embed(tokens, self.positions[: tokens.shape[1]])
        mask = None if memory_mask is None else memory_mask[:, None, None]
        for layer in self.layers:
            keys_values = layer.cross_attention.keys_values(memory)
            states = layer(states, keys_values, mask, scores=scores)
        return self.logits(states)

    def start(
        self,
        memory: Float[Tensor, "B M D"],
        memory_mask: Bool[Tensor, "B M"] | None,
        *,
        max_length: int,
    ) -> "Cache":
        """Return a cache for reading one token at a time, with the memory projected once."""
        crosses = [layer.cross_attention.keys_values(memory) for layer in self.layers]
        mask = None if memory_mask is None else memory_mask[:, None, None]
        return Cache(crosses, mask, max_length)

    def step(self, tokens: Int[Tensor, " B"], cache: "Cache") -> Float[Tensor, "B V"]:
        """Return the logits of the token after `tokens`, and put those into the cache."""
        states = self._embed(tokens[:, None], self.positions[cache.length])
        for index, (layer, cross) in enumerate(zip(self.layers, cache.crosses, strict=True)):
            states = layer(
                states, cross, cache.mask, partial(cache.extend, index), sharing=cache.sharing
            )
        cache.length += 1
        return self.logits(states)[:, 0]

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) * math.sqrt(self.width) + positions)

    def logits(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Return the read-out of states of the residual stream, the last layer's or any other."""
        weight = self.embedding.weight if self.read_out is None else self.read_out.weight
        return F.linear(self.norm(states), weight, self.bias)


class Cache:
    """Keys and values of the memory and of the tokens so far, in tensors of fixed length."""

    def __init__(self, crosses: list[Tensor], mask: Tensor | None, max_length: int) -> None:
        self.crosses = crosses  # a layer each: "2 pages heads M d"
        self.mask = mask
        two, batch, heads, _, width = crosses[0].shape
        self.pasts = [cross.new_empty(two, batch, heads, max_length, width) for cross in crosses]
        self.length = 0
        self.sharing = 1
        """Rows a page."""

    def extend(self, layer: int, newest: Float[Tensor, "2 B heads 1 d"]) -> Tensor:
        """Put a layer's keys and values of the newest token into the cache; return all so far."""
        past = self.pasts[layer]
        past[:, :, :, self.length] = newest[:, :, :, 0]
        return past[:, :, :, : self.length + 1]

    def share(self, rows: int) -> None:
        """Have so many rows a page, all with its one past."""
        self.sharing *= rows
        self.pasts = [past.repeat_interleave(rows, dim=1) for past in self.pasts]

    def keep(self, pages: Int[Tensor, " kept"]) -> None:
        """Keep these pages alone, in this order."""
        self.crosses = [cross.index_select(1, pages) for cross in self.crosses]
        self.mask = None if self.mask is None else self.mask.index_select(0, pages)

    def take(self, rows: Int[Tensor, " rows"]) -> None:
        """Let the rows have the pasts of these, for each page's rows those of some of its own."""
        for layer, past in enumerate(self.pasts):
            chosen = past[:, :, :, : self.length].index_select(1, rows)
            self.pasts[layer] = past = past[:, : len(rows)]
            past[:, :, :, : self.length] = chosen
