"""What a Transformer reader does while it reads, as figures: attention, residual stream, circuits.

Nothing here is drawn (`explain_figures.py` draws), and nothing is estimated: each number is one that the
model itself computes, or is computed from its weights.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.errors import UserError
from paragraph_ocr.model.decoder import Attention, Decoder, Layer
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Greedy
from paragraph_ocr.model.reader import Reader
from paragraph_ocr.model.transformer import TransformerReader

BLOCKS = ("self", "cross", "forward")
"""The blocks of a layer, in order."""

NO_ATTENTION = (
    "model=line_cnn has no attention to explain. Pass a Transformer's run, or model=tiny."
)


@dataclass(frozen=True, slots=True)
class Trace:
    """One teacher-forced pass over a text: position i has read token i, and writes the one after it."""

    tokens: Int[Tensor, " L"]
    """From the start token on, without the end."""
    self_attention: Float[Tensor, "layers heads L L"]
    """How much of each earlier position every position gathers; rows sum to 1."""
    cross_attention: Float[Tensor, "layers heads L h w"]
    """How much of each cell of the page every position gathers; each grid sums to 1."""
    streams: Float[Tensor, "stages L D"]
    """The residual stream after the embedding and after each block."""
    stages: tuple[str, ...]
    """What the streams follow: "embedding", "1 self", "1 cross", "1 forward", "2 self" ..."""
    logits: Float[Tensor, "L V"]
    cell_px: tuple[int, int]
    """Height and width of a cell of the page."""

    def looks(self) -> Float[Tensor, "L h w"]:
        """Return where each position looks: its cross-attention averaged over the last layer's heads."""
        return self.cross_attention[-1].mean(dim=0)


def require_transformer(model: Reader) -> TransformerReader:
    """Return the model, if it is one that can be explained.

    Raises:
        UserError: it has no attention.
    """
    if not isinstance(model, TransformerReader):
        raise UserError(NO_ATTENTION)
    return model


def attention_weights(
    attention: Attention,
    states: Float[Tensor, "B L D"],
    keys_values: Float[Tensor, "2 B heads M d"],
    *,
    mask: Bool[Tensor, "B 1 1 M"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B heads L M"]:
    """Return the weights by which `Attention.forward`, called alike, mixes the values.

    The module asks torch's fused kernel, which keeps them to itself; here the same projections are
    multiplied out: softmax(QK'/sqrt(d)), Vaswani et al. 2017.
    """
    queries = attention.query(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    keys = keys_values[0]
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(~causal_mask(scores.shape[-1]).to(scores.device), -torch.inf)
    return scores.softmax(dim=-1)


def causal_mask(length: int) -> Bool[Tensor, "length length"]:
    """Return true where a position (row) may see another (column): itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool).tril()


@torch.no_grad()
def trace(
    model: TransformerReader,
    page: UInt8[Tensor, "1 H W"],
    tokens: Sequence[int],
    *,
    size: tuple[int, int] | None = None,
) -> Trace:
    """Return what happens in the model while it is fed the tokens.

    Args:
        tokens: from the start token on, without the end; at most the decoder's positions.
        size: height and width of the true page on its canvas; None if it fills it.
    """
    assert not model.training and isinstance(model.encoder, Encoder)
    fed = torch.tensor([list(tokens)])
    sizes = None if size is None else torch.tensor([size])
    attentions: dict[str, list[Tensor]] = {"self": [], "cross": []}
    streams: dict[tuple[int, str], Tensor] = {}
    layers = layers_of(model.decoder)

    def attending(kind: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple, keywords: dict[str, Any], _: Tensor) -> None:
            assert isinstance(module, Attention)
            attentions[kind].append(attention_weights(module, *inputs, **keywords)[0])

        return record

    def streaming(place: tuple[int, str], *, before: bool) -> Callable[..., None]:
        def record(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            streams[place] = (inputs[0] if before else output)[0]

        return record

    with ExitStack() as stack:

        def watch(module: nn.Module, hook: Callable[..., None], **options: bool) -> None:
            stack.callback(module.register_forward_hook(hook, **options).remove)

        for number, layer in enumerate(layers, start=1):
            watch(layer.self_attention, attending("self"), with_kwargs=True)
            watch(layer.cross_attention, attending("cross"), with_kwargs=True)
            if number == 1:
                watch(layer, streaming((0, "embedding"), before=True))
            # a norm before its block is given the sum of those before; one after it gives the sum
            norms = list(layer.norms)
            for norm, block in zip(norms[1:] if layer.pre else norms[:-1], BLOCKS[:2], strict=True):
                watch(norm, streaming((number, block), before=layer.pre))
            watch(layer, streaming((number, BLOCKS[2]), before=False))
        memory = model.encode(page[None], sizes)
        logits = model.decoder(fed, memory.states, memory.mask)
    places = [(0, "embedding"), *((n, b) for n in range(1, len(layers) + 1) for b in BLOCKS)]
    height, width = model.encoder.stride
    return Trace(
        tokens=fed[0],
        self_attention=torch.stack(attentions["self"]),
        cross_attention=torch.stack(attentions["cross"]).unflatten(-1, memory.grid),
        streams=torch.stack([streams[place] for place in places]),
        stages=tuple(f"{number} {block}" if number else block for number, block in places),
        logits=logits[0],
        cell_px=(height, width),
    )


def trace_free(
    model: TransformerReader,
    page: UInt8[Tensor, "1 H W"],
    *,
    size: tuple[int, int] | None = None,
    max_length: int,
) -> Trace:
    """Return the trace of a free-running reading, each token the likeliest after those before it.

    It is teacher forcing with the model's own text for a teacher: the same states, the same logits.
    """
    sizes = None if size is None else torch.tensor([size])
    (reading,) = model.read(page[None], sizes, decoding=Greedy(), max_length=max_length)
    return trace(model, page, [model.special.start, *reading.tokens], size=size)


@torch.no_grad()
def logit_lens(decoder: Decoder, streams: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
    """Return what the decoder would write, were the layer at hand its last (nostalgebraist 2020).

    The read-out, and before it a pre-norm decoder's last LayerNorm, are applied to every stream as to
    the last: there, the lens shows the logits themselves.
    """
    return decoder.logits(streams)


def entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """Return how undecided each distribution is, in bits: 0 is certain, log2(V) knows nothing."""
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1) / math.log(2)


@torch.no_grad()
def feature_maps(
    encoder: Encoder, page: UInt8[Tensor, "1 H W"], *, size: tuple[int, int] | None = None
) -> dict[str, Float[Tensor, "C h w"]]:
    """Return the features of a page after each part of the ResNet that ends at a new resolution."""
    outputs: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for name, child in encoder.net.named_children():

            def record(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and output.ndim == 4:
                    outputs.append((name, output[0].clone()))

            stack.callback(child.register_forward_hook(record).remove)
        features = encoder(page[None], None if size is None else torch.tensor([size]))[0]
    last_at = {output.shape[1:]: (name, output) for name, output in outputs}
    return dict(last_at.values()) or {"features": features}


@dataclass(frozen=True, slots=True)
class Circuit:
    """One head's product of two of its matrices, "D D" and of rank d at most, as its singular values."""

    singular: Float[Tensor, " d"]
    """Largest first."""

    @property
    def effective_rank(self) -> float:
        """How many directions it uses: exp of the entropy of the singular values' shares.

        d if all are alike, 1 if one is alone (Roy & Vetterli 2007).
        """
        return effective_rank(self.singular)


def effective_rank(singular: Float[Tensor, " n"]) -> float:
    shares = singular.double() / singular.double().sum()
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def circuits(attention: Attention) -> dict[str, list[Circuit]]:
    """Return the QK and OV circuits of each head (Elhage et al. 2021), biases left out.

    QK scores a pair of states: query' QK key says how much the one looks at the other. OV carries a
    state that is looked at into the residual stream.
    """
    heads = attention.heads
    query = attention.query.weight.unflatten(0, (heads, -1))
    key, value = attention.key_value.weight.unflatten(0, (2, heads, -1))
    out = attention.out.weight.unflatten(1, (heads, -1)).transpose(0, 1)
    return {
        "QK": [_circuit(q.mT, k) for q, k in zip(query, key, strict=True)],
        "OV": [_circuit(o, v) for o, v in zip(out, value, strict=True)],
    }


def random_circuit(width: int, head_width: int, *, seed: int) -> Circuit:
    """Return the circuit of two matrices of a head's shape whose entries are independent and normal."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(width, head_width, generator=generator)
    right = torch.randn(head_width, width, generator=generator)
    return _circuit(left, right)


def random_matrix(width: int, *, seed: int) -> Circuit:
    """Return a full square matrix of independent normal entries, which has no low rank."""
    generator = torch.Generator().manual_seed(seed)
    return Circuit(torch.linalg.svdvals(torch.randn(width, width, generator=generator)))


def mass_inside(
    weights: Float[Tensor, "*N h w"], box: Sequence[int] | np.ndarray, *, cell_px: tuple[int, int]
) -> Float[Tensor, "*N"]:
    """Return the share of attention inside a box; a cell counts by the share of it that is inside.

    Args:
        box: left, top, right, bottom in pixels of the page.
        cell_px: height and width of a cell.
    """
    left, top, right, bottom = (float(side) for side in box)
    inside = [
        ((starts + step).clamp(max=high) - starts.clamp(min=low)).clamp(min=0) / step
        for step, count, low, high in (
            (cell_px[0], weights.shape[-2], top, bottom),
            (cell_px[1], weights.shape[-1], left, right),
        )
        for starts in [torch.arange(count) * float(step)]
    ]
    return (weights * (inside[0][:, None] * inside[1])).sum(dim=(-2, -1))


def lines_of(text: str) -> list[int]:
    """Return the line that each character of a text belongs to; a newline ends its own."""
    lines, line = [], 0
    for character in text:
        lines.append(line)
        line += character == "\n"
    return lines


def _circuit(left: Float[Tensor, "D d"], right: Float[Tensor, "d D"]) -> Circuit:
    """Return the circuit of a product, found in matrices of the size of its rank."""
    with torch.no_grad():
        _, first = torch.linalg.qr(left.double())
        _, second = torch.linalg.qr(right.double().mT)
        return Circuit(torch.linalg.svdvals(first @ second.mT).float())


def layers_of(decoder: Decoder) -> list[Layer]:
    layers = list(decoder.layers)
    assert all(isinstance(layer, Layer) for layer in layers)
    return cast(list[Layer], layers)
