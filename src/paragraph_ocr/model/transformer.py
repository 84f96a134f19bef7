"""The recognizer: page in, text out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Beam, Greedy, Reading, SpecialTokens, generate
from paragraph_ocr.model.positions import add_grid_positions
from paragraph_ocr.model.reader import Letters, Reader, compiled_for, token_loss
from paragraph_ocr.model.vote import Vote

_NOWHERE = -100
"""Target of a cross-entropy that does not count."""


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

    def teach(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None = None,
        letters: Letters | None = None,
    ) -> tuple[Float[Tensor, "B L V"], Float[Tensor, ""] | None]:
        return self._teach(self.encode(images, sizes), tokens, letters)

    def _teach(
        self, memory: Memory, tokens: Int[Tensor, "B L"], letters: Letters | None
    ) -> tuple[Float[Tensor, "B L V"], Float[Tensor, ""] | None]:
        scores: list[Tensor] | None = None if letters is None else []
        logits = self.decoder(tokens, memory.states, memory.mask, scores)
        if letters is None or scores is None:
            return logits, None
        return logits, self._guidance(memory, scores, letters)

    def _guidance(
        self, memory: Memory, scores: Sequence[Float[Tensor, "B L M"]], letters: Letters
    ) -> Float[Tensor, ""]:
        """Return the cross-entropies of two things that whoever reads must know, summed over the letters.

        Which letter is at its place: the read-out of the cell there. And where the next one is: the mean of
        what the first head of each layer but the lowest looks at, which does not know yet where it is.
        """
        assert isinstance(self.encoder, Encoder)
        known = ~letters.places[..., 0].isnan()
        sides = [*zip(self.encoder.stride[::-1], memory.grid[::-1], strict=True)]
        column, row = (
            (letters.places[..., axis].nan_to_num() / stride).long().clamp(0, count - 1)
            for axis, (stride, count) in enumerate(sides)
        )
        cells = row * memory.grid[1] + column
        there = memory.states.gather(1, cells[..., None].expand(-1, -1, memory.states.shape[2]))
        wanted = [(self.decoder.logits(there), letters.tokens, 1.0)]
        upper = scores[1:] or scores
        wanted += [(looked, cells, 1 / len(upper)) for looked in upper]
        costs = [
            weight * _summed_cross_entropy(logits, targets.where(known, _NOWHERE))
            for logits, targets, weight in wanted
        ]
        return torch.stack(costs).sum()

    def compiled(
        self, *, canvas: tuple[int, int] | None
    ) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Return `teach` by torch.compile; of several canvases the encoder of one alone.

        One graph for all of them is not to be had: on an H200 it was not compiled after 160 s.
        """
        if canvas is None:
            return super().compiled(canvas=None)
        encode = compiled_for(canvas, self.encode)

        def teach(
            images: Tensor,
            tokens: Tensor,
            sizes: Tensor | None = None,
            letters: Letters | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            return self._teach(encode(images, sizes), tokens, letters)

        return teach

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
        decoding: Greedy | Beam | Vote,
        max_length: int,
    ) -> list[Reading]:
        """Return a reading of each page (free-running).

        Args:
            max_length: tokens at most, start and end included; no more than the decoder's.
        """
        each = partial(generate, self.decoder, special=self.special, max_length=max_length)
        if not isinstance(decoding, Vote):
            memory = self.encode(images, sizes)
            return each(memory.states, memory.mask, decoding=decoding)
        most = max_length - 1  # without start
        return [
            decoding.chosen(its, most) for its in self._views_read(images, sizes, decoding, each)
        ]

    def _views_read(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None,
        vote: Vote,
        each: Callable[..., list[Reading]],
    ) -> list[list[Reading]]:
        """Return of each page as many readings as it needs."""
        readings: list[list[Reading]] = [[] for _ in images]
        going = torch.arange(len(images))
        for views in vote.rounds:
            # a GPU plans its convolutions anew for each number of pages: it reads what nobody needs
            read = torch.arange(len(images)) if images.is_cuda else going
            pages, their = images[read], None if sizes is None else sizes[read]
            # one after another: encoding takes by far the most memory
            seen = [self.encode(drawn).states for drawn in vote.drawn(pages, their, views)]
            found = each(torch.cat(seen), None, decoding=Greedy())
            for page in going.tolist():
                readings[page] += found[int((read == page).nonzero()) :: len(read)]
            its = [readings[page] for page in going.tolist()]
            going = going[[len(own) < vote.needed(own) for own in its]]
            if not len(going):
                break
        return readings


def _summed_cross_entropy(
    logits: Float[Tensor, "B L V"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, ""]:
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_NOWHERE, reduction="sum"
    )
