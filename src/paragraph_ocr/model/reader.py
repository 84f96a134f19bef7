"""What every model offers to learning and reading: pages in, logits and text out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.model.generate import Reading


class Letters(NamedTuple):
    """What is to be read next after each of the tokens that a model is fed, and where that is."""

    tokens: Int[Tensor, "B L"]
    places: Float[Tensor, "B L 2"]
    """x and y in pixels of the middle of its ink, NaN where it has none or nobody knows."""


class Reader(nn.Module, ABC):
    """A model that reads pages; `encoder` is the part of it that looks."""

    encoder: nn.Module

    @abstractmethod
    def forward(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return logits for `loss`; `tokens` is the true text from its start on, without its end."""

    @abstractmethod
    def loss(
        self,
        logits: Float[Tensor, "B T V"],
        targets: Int[Tensor, "B L"],
        *,
        label_smoothing: float,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the cost of the logits summed over the targets (text, end, then pad), and their number."""

    @abstractmethod
    def read(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None = None,
        *,
        decoding: Any,
        max_length: int,
    ) -> list[Reading]:
        """Return a reading of each page, of at most `max_length` tokens with start and end."""

    def teach(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None = None,
        letters: "Letters | None" = None,
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, ""] | None]:
        """Return the logits of `forward`, and what not looking where the letters are costs, summed over
        them; None of a model that cannot be told, or where nobody knows."""
        return self.forward(images, tokens, sizes), None

    def compiled(
        self, *, canvas: tuple[int, int] | None
    ) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Return `teach` by torch.compile.

        Args:
            canvas: of several that pages come on, the one that is worth compiling for: height and width in
                pixels. None if there is but one.
        """
        return torch.compile(self.teach)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights and statistics, contiguous on the CPU, for a safetensors file."""
        return {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }


def compiled_for(canvas: tuple[int, int], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of pages "B 1 H W" by torch.compile, on any other canvas as it is."""
    compiled = torch.compile(function, dynamic=False)

    def chosen(images: Tensor, *others: Any) -> Any:
        return (compiled if images.shape[-2:] == canvas else function)(images, *others)

    return chosen


def token_loss(
    logits: Float[Tensor, "B L V"],
    targets: Int[Tensor, "B L"],
    *,
    pad: int,
    label_smoothing: float,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the cross-entropy summed over all targets but pad, and their number."""
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=pad,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return loss, (targets != pad).sum()
