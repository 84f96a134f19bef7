"""Batch: the only type that data and model share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Paragraphs on one canvas, with their transcriptions; padding is paper and never counts.

    Moves between devices like a tensor, so Lightning and the DataLoader's pinning thread take it.
    """

    images: UInt8[Tensor, "B 1 H W"]
    """0 is paper, 255 is ink."""
    tokens: Int[Tensor, "B L"]
    """Start, text, end, then pad up to the longest transcription of the batch."""
    sizes: Int[Tensor, "B 2"] | None
    """True height and width in pixels, from the top left; None when every image fills the canvas."""
    rows: Int[Tensor, " B"]
    """Row of each paragraph in its store; -1 for one that was made on the way."""
    letters: Float[Tensor, "B L 2"] | None = None
    """x and y in pixels of the middle of each token's ink, NaN for one without ink or at a place that nobody
    knows; None if none is known."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        return type(self)(
            function(self.images),
            function(self.tokens),
            None if self.sizes is None else function(self.sizes),
            function(self.rows),
            None if self.letters is None else function(self.letters),
        )
