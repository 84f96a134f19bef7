"""LineCnn: a small CNN slid along a line of text, the lab's baseline from before Transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from paragraph_ocr.model.generate import Reading, SpecialTokens
from paragraph_ocr.model.reader import Reader, token_loss

LOSSES = ("windows", "ctc")

_INK = 0.25
"""Share of full ink from which a pixel counts as writing."""


class LineCnn(Reader):
    """LeNet-like: two convolutions and pooling over the line, then a hidden layer over each window.

    The convolutions run once over the whole line, so that windows that overlap share their work; at
    its edges a window therefore sees 2 px of its neighbours, where the lab's sees paper.

    A window of paper may be a space or lie beyond the end, and looks the same; so each window is also
    told whether ink follows on its line.

    With loss "windows", as in the FSDL 2022 lab's LineCNNSimple, window i is character i and the first
    window after the text is its end: right where characters stand `window_stride_px` apart, and only
    there. With "ctc" (Graves et al. 2006) a window may also hold nothing or more of the character
    before, so that any pitch can be learned; label smoothing has no part in it.

    Args:
        height: of the line in pixels; lower images are padded with paper.
        window_width_px, window_stride_px: even, because pooling halves the line.
        width: of the hidden layer.
        blank: the token that CTC writes for nothing.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        height: int,
        window_width_px: int,
        window_stride_px: int,
        channels: int,
        width: int,
        dropout: float,
        loss: str,
        special: SpecialTokens,
        blank: int,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is none of {LOSSES}")
        if window_width_px % 2 or window_stride_px % 2:
            raise ValueError(f"windows {window_width_px} px wide, {window_stride_px} px apart")
        self.height = height
        self.window_width_px, self.window_stride_px = window_width_px, window_stride_px
        self.kind, self.special, self.blank = loss, special, blank
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.MaxPool2d(2),
            nn.Conv2d(
                channels,
                width,
                (height // 2, window_width_px // 2),
                stride=(1, window_stride_px // 2),
            ),
            nn.ReLU(),
        )
        self.head = nn.Linear(width + 1, num_tokens)  # and whether ink follows

    def num_windows(self, width_px: int) -> int:
        """Return how many windows cover a line."""
        return 1 + max(0, -((self.window_width_px - width_px) // self.window_stride_px))

    def look(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None = None,
        *,
        at_least: int = 1,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of every window from left to right, beyond the line if asked for.

        Raises:
            ValueError: images are higher than the model's lines.
        """
        height, width = images.shape[2:]
        if height > self.height:
            raise ValueError(f"images {height} px high for lines of {self.height} px")
        pages = images.float() / 255
        if sizes is not None:  # beyond its size a page is paper, whatever the canvas holds
            inside = [
                torch.arange(length, device=images.device) < sizes[:, axis, None]
                for axis, length in enumerate((height, width))
            ]
            pages = pages * (inside[0][:, None, :, None] & inside[1][:, None, None, :])
        count = max(at_least, self.num_windows(width))
        covered = (count - 1) * self.window_stride_px + self.window_width_px
        pages = F.pad(pages, (0, covered - width, 0, self.height - height))
        columns = torch.arange(pages.shape[3], device=pages.device)
        inked = (pages > _INK).any(dim=2)[:, 0] * (columns + 1)
        starts = columns[:: self.window_stride_px][:count]
        follows = starts < inked.amax(dim=1, keepdim=True)
        features = self.encoder(pages).squeeze(2).mT
        return self.head(torch.cat([features, follows.unsqueeze(2).to(features)], dim=2))

    def forward(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the windows' logits: as many as there are tokens, or with CTC all of them."""
        if self.kind == "ctc":
            return self.look(images, sizes)
        length = tokens.shape[1]
        return self.look(images, sizes, at_least=length)[:, :length]

    def loss(
        self,
        logits: Float[Tensor, "B T V"],
        targets: Int[Tensor, "B L"],
        *,
        label_smoothing: float,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        if self.kind == "windows":
            return token_loss(
                logits, targets, pad=self.special.pad, label_smoothing=label_smoothing
            )
        lengths = (targets != self.special.pad).sum(dim=1) - 1  # the end of a line needs no token
        loss = F.ctc_loss(
            logits.float().log_softmax(dim=-1).transpose(0, 1),
            targets,
            input_lengths=torch.full_like(lengths, logits.shape[1]),
            target_lengths=lengths,
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )
        return loss, lengths.sum()

    @torch.no_grad()
    def read(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        sizes: Int[Tensor, "B 2"] | None = None,
        *,
        decoding: Any,
        max_length: int,
    ) -> list[Reading]:
        """Return the likeliest token of each window; windows know nothing of one another.

        Args:
            decoding: of no effect.
        """
        extra = 0 if self.kind == "ctc" else max_length - 1
        scores, tokens = self.look(images, sizes, at_least=extra).float().log_softmax(-1).max(-1)
        return [
            self._reading(row, score, max_length)
            for row, score in zip(tokens.tolist(), scores.tolist(), strict=True)
        ]

    def _reading(self, tokens: list[int], scores: list[float], max_length: int) -> Reading:
        if self.kind == "ctc":
            before = [self.blank, *tokens]
            written = [i for i, token in enumerate(tokens) if token not in (before[i], self.blank)]
            total = sum(scores)
        else:
            ended = tokens.index(self.special.end) if self.special.end in tokens else len(tokens)
            written = list(range(ended))
            total = sum(scores[: ended + 1])
        written = written[: max_length - 2]
        confidences = torch.tensor([scores[i] for i in written]).exp().tolist()
        return Reading([tokens[i] for i in written], confidences, total)
