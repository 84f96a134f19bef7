"""The recognizer: page in, text out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Beam, Greedy, Reading, SpecialTokens, generate
from paragraph_ocr.model.positions import add_grid_positions
from paragraph_ocr.model.reader import Reader, token_loss


@dataclass(frozen=True, slots=True)
class Memory:
    """An encoded page: what the decoder looks at."""

    states: Float[Tensor, "B M D"]
    """Cells of the feature grid, row by row."""
    mask: Bool[Tensor, "B M"] | None
    """True where a cell lies on the page; None if all do."""
    grid: tuple[int, int]
    """Rows and columns of cells."""


class TransformerReader(Reader):
    """Encoder, projection to the decoder's width, 2-D positions, decoder."""

    def __init__(self, encoder: Encoder, decoder: Decoder, *, special: SpecialTokens) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Conv2d(encoder.channels, decoder.width, kernel_size=1)
        self.decoder = decoder
        self.special = special

    def encode(
        self, images: UInt8[Tensor, "B 1 H W"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> Memory:
        """Return the memory of the pages; `sizes` as in `Encoder.forward`."""
        features = add_grid_positions(self.project(self.encoder(images, sizes)))
        grid = (features.shape[2], features.shape[3])
        mask = None if sizes is None else self.encoder.cells(sizes, grid).flatten(1)
        return Memory(features.flatten(2).transpose(1, 2), mask, grid)

    def forward(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Return the logits of the token after each of `tokens` (teacher forcing)."""
        memory = self.encode(images, sizes)
        return self.decoder(tokens, memory.states, memory.mask)

    def compiled(self, *, canvases_vary: bool) -> Callable[..., Float[Tensor, "B L V"]]:
        """Return `forward` by torch.compile; where canvases vary, the encoder alone, once for each.

        One graph for all of them is not to be had: on an H200 it was not compiled after 160 s.
        """
        if not canvases_vary:
            return super().compiled(canvases_vary=False)
        encode = torch.compile(self.encode, dynamic=False)

        def forward(images: Tensor, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
            memory = encode(images, sizes)
            return self.decoder(tokens, memory.states, memory.mask)

        return forward

    def loss(
        self,
        logits: Float[Tensor, "B T V"],
        targets: Int[Tensor, "B L"],
        *,
        label_smoothing: float,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        return token_loss(logits, targets, pad=self.special.pad, label_smoothing=label_smoothing)

    @torch.no_grad()
    def read(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None = None,
        *,
        decoding: Greedy | Beam,
        max_length: int,
    ) -> list[Reading]:
        """Return a reading of each page (free-running).

        Args:
            max_length: tokens at most, start and end included; no more than the decoder's.
        """
        memory = self.encode(images, sizes)
        return generate(
            self.decoder,
            memory.states,
            memory.mask,
            special=self.special,
            decoding=decoding,
            max_length=max_length,
        )
