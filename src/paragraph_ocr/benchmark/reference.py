"""The design published by the Full Stack Deep Learning course in 2022, implemented plainly.

Its ResnetTransformer, trained in fp16 with a gradient scaler, read by decoding the whole prefix anew
at each step. This is what speed is compared with, and what `model=reference` is tested against.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.model.transformer import TransformerReader

START, END, PAD = 1, 2, 3
"""Tokens of the published vocabulary."""

STRIDE = 32
"""Pixels of the page that a cell of torchvision's ResNet-18 is wide and high."""

PUBLISHED_TRAINING = {16: 362.0, 64: 664.0}
"""Images a second by batch size: 576x640 px, 682 tokens,, as measured on one H100."""

PUBLISHED_READING = {1: 3.72, 16: 3.82, 64: 3.96}
"""Seconds by batch size to read 682 tokens of 576x640 px, as measured on one H100."""


class Reference(nn.Module):
    """ResNet-18 without pool and head, 1x1 projection, sine positions, torch's post-norm decoder."""

    grid_positions: Tensor
    token_positions: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        num_tokens: int = 84,
        canvas: tuple[int, int] = (576, 640),
        max_length: int = 682,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        feed_forward: int = 1024,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.width = width
        self.resnet = torchvision.models.resnet18(weights=None)
        del self.resnet.avgpool, self.resnet.fc
        self.project = nn.Conv2d(512, width, kernel_size=1)
        self.embedding = nn.Embedding(num_tokens, width)
        layer = nn.TransformerDecoderLayer(width, heads, feed_forward, dropout)
        self.decoder = nn.TransformerDecoder(layer, depth)
        self.read_out = nn.Linear(width, num_tokens)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.read_out.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(dropout)
        rows, columns = (math.ceil(side / STRIDE) for side in canvas)
        along_rows = sines(rows, width // 2)[:, None].expand(-1, columns, -1)
        along_columns = sines(columns, width // 2)[None].expand(rows, -1, -1)
        grid = torch.cat([along_rows, along_columns], dim=-1).permute(2, 0, 1)
        self.register_buffer("grid_positions", grid.contiguous(), persistent=False)
        self.register_buffer("token_positions", sines(max_length, width), persistent=False)
        mask = torch.full((max_length, max_length), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def encode(self, images: UInt8[Tensor, "B 1 H W"]) -> Float[Tensor, "M B D"]:
        features = (images.float() / 255).repeat(1, 3, 1, 1)
        for layer in self.resnet.children():
            features = layer(features)
        cells = self.project(features) + self.grid_positions
        return cells.flatten(2).permute(2, 0, 1)

    def decode(
        self, memory: Float[Tensor, "M B D"], tokens: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L V"]:
        """Return the logits of the token after each of `tokens`."""
        length = tokens.shape[1]
        states = self.embedding(tokens.T) * math.sqrt(self.width)
        states = self.dropout(states + self.token_positions[:length, None])
        states = self.decoder(states, memory, tgt_mask=self.mask[:length, :length])
        return self.read_out(states).transpose(0, 1)

    def forward(
        self, images: UInt8[Tensor, "B 1 H W"], tokens: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L V"]:
        return self.decode(self.encode(images), tokens)

    def loss(
        self, images: UInt8[Tensor, "B 1 H W"], tokens: Int[Tensor, "B L"]
    ) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of the tokens after the first, pad left out."""
        logits = self(images, tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=PAD)

    @torch.no_grad()
    def read(
        self, images: UInt8[Tensor, "B 1 H W"], *, max_length: int
    ) -> Int[Tensor, "B max_length"]:
        """Return start and what follows, greedily, until every row has ended; then pad."""
        memory = self.encode(images)
        written = torch.full((len(images), max_length), PAD, device=images.device)
        written[:, 0] = START
        for length in range(1, max_length):
            logits = self.decode(memory, written[:, :length])
            written[:, length] = logits[:, -1].argmax(dim=-1)
            if (written == END).any(dim=1).all():
                break
        return written


def published_precision(device: torch.device) -> str:
    """Return the precision that the design was published with, by pl.Trainer's name."""
    return "16-mixed" if device.type == "cuda" else "32-true"


class ReferenceTraining:
    """Training as published: Adam, and fp16 with a gradient scaler on a GPU; float32 on a CPU."""

    def __init__(self, model: Reference, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.device, self.half = device, published_precision(device) == "16-mixed"
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def step(self, images: UInt8[Tensor, "B 1 H W"], tokens: Int[Tensor, "B L"]) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            loss = self.model.loss(images, tokens)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


def sines(length: int, channels: int) -> Float[Tensor, "length channels"]:
    """Return the fixed positions of Vaswani et al. 2017: sines in even channels, cosines in odd."""
    rates = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
    angles = torch.arange(length)[:, None] * rates
    code = torch.zeros(length, channels)
    code[:, 0::2], code[:, 1::2] = angles.sin(), angles.cos()
    return code


def suppress_end(model: Reference) -> None:
    """Have the model never write the end, so that every reading is as long as it may be."""
    with torch.no_grad():
        model.read_out.bias[END] = -1e4  # within fp16's range


def copy_weights(reference: Reference, ours: TransformerReader) -> None:
    """Give `ours`, built as `model=reference`, weights and statistics of the reference.

    Raises:
        ValueError: they are not of one shape.
    """
    try:
        ours.load_state_dict(as_ours(reference.state_dict()))
    except RuntimeError as error:
        raise ValueError(f"ours is not built like the reference: {error}") from error


_IN_LAYERS = (
    ("multihead_attn", "cross_attention"),
    ("self_attn", "self_attention"),
    ("out_proj", "out"),
    ("linear1", "expand"),
    ("linear2", "contract"),
)


def as_ours(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference's tensors (weights, or their gradients) under our names for them."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        name = name.replace("resnet.", "encoder.net.", 1)
        for old, new in (("embedding.", "decoder.embedding."), ("read_out.", "decoder.read_out.")):
            name = new + name.removeprefix(old) if name.startswith(old) else name
        for old, new in _IN_LAYERS:
            name = name.replace(f".{old}.", f".{new}.")
        name = re.sub(r"\.norm([123])\.", lambda found: f".norms.{int(found[1]) - 1}.", name)
        if ".in_proj_" in name:  # queries, keys and values in one
            attention, kind = name.split(".in_proj_")
            width = len(tensor) // 3
            ours[f"{attention}.query.{kind}"] = tensor[:width]
            ours[f"{attention}.key_value.{kind}"] = tensor[width:]
        else:
            ours[name.replace("decoder.read_out.bias", "decoder.bias")] = tensor
    return ours
