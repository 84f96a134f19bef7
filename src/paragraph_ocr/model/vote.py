"""Several views of a page, each read by itself, and a text by their votes.

A model reads a page otherwise when it is leant, turned or stretched a little, and errs in other places. The
readings are aligned and vote for each character: recogniser output voting error reduction (Fiscus 1997).
The less the first two agree, the more are needed; where a word is none they tell what was meant.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from paragraph_ocr.model.generate import Reading
from paragraph_ocr.model.lexicon import Lexicon

_INK = 64  # grey level from which a pixel counts as ink
_MARGIN, _LEAST_MARGIN = 0.03, 0.01  # shares of the canvas: where there is room, and anyway

_SURENESS = 20.0
"""A reading's vote falls by exp(-20) for each nat a token that it is less sure than the surest one."""

_CONFIDENCE = 3
"""Power of a token's probability that its vote has. Both were chosen on rendered pages of validation texts in
held-out faces; half or twice the one, 2 or 5 as the other give up to 2% more errors."""


class View(NamedTuple):
    """How a page is drawn: leant, then turned, then stretched, and shrunk to its canvas if need be."""

    width: float
    height: float
    """Factors."""
    lean_deg: float
    """By which upright strokes come to lean to the left."""
    turn_deg: float
    """Clockwise."""

    @property
    def linear(self) -> Float[Tensor, "2 2"]:
        """The map from (x, y) on the page to the view, but for where it begins."""
        lean, turn = math.radians(self.lean_deg), math.radians(self.turn_deg)
        cos, sin = math.cos(turn), math.sin(turn)
        stretched = torch.tensor([[self.width, 0.0], [0.0, self.height]])
        turned = torch.tensor([[cos, -sin], [sin, cos]])
        return stretched @ turned @ torch.tensor([[1.0, math.tan(lean)], [0.0, 1.0]])


@dataclass(frozen=True, slots=True)
class Vote:
    """Read each view greedily, and take what most of them have written."""

    views: tuple[View, ...]
    canvas: tuple[int, int]
    """Height and width that views are drawn on, in pixels."""
    enough: tuple[tuple[int, float], ...] = ()
    """How many readings are enough where the first two differ in at most a share of their characters: both
    rising. Where they differ in more, and without any, all views are read."""
    lexicon: Lexicon | None = None

    @property
    def rounds(self) -> list[tuple[View, ...]]:
        """The views that are read first, and those that are read where these are not enough."""
        ends = [0, *(count for count, _ in self.enough), len(self.views)]
        return [self.views[a:b] for a, b in pairwise(ends)]

    def needed(self, readings: Sequence[Reading]) -> int:
        """Return how many readings a page needs, by its first two."""
        if len(readings) < 2:
            return len(self.views)
        first, second = (reading.tokens for reading in readings[:2])
        longer = max(1, len(first), len(second))
        share = Levenshtein.distance(first, second) / longer
        return next((count for count, most in self.enough if share <= most), len(self.views))

    def chosen(self, readings: Sequence[Reading], most: int) -> Reading:
        """Return what a page's readings come to; most tokens as in `voted`."""
        reading = voted(readings, most)
        if self.lexicon is None:
            return reading
        return self.lexicon.corrected(reading, readings, _weights(readings), most)

    def drawn(
        self,
        images: UInt8[Tensor, "B 1 h w"],
        sizes: Int[Tensor, "B 2"] | None,
        views: Sequence[View] | None = None,
    ) -> Iterator[UInt8[Tensor, "B 1 H W"]]:
        """Yield the pages as each of the views shows them.

        Args:
            sizes: as in `Encoder.forward`; what lies beyond them does not come into view.
            views: None for all of them.
        """
        if sizes is not None:
            rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
            inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
            images = images * inside[:, None]
        ends = _ends_of_rows(images)
        pages = images.float()
        for view in self.views if views is None else views:
            yield self._shown(view, pages, ends)

    def _shown(
        self, view: View, pages: Float[Tensor, "B 1 h w"], ends: Float[Tensor, "B 2 2*h"]
    ) -> UInt8[Tensor, "B 1 H W"]:
        with torch.autocast(pages.device.type, enabled=False):  # bfloat16 knows places to some 2 px
            canvas = torch.tensor(self.canvas[::-1], device=pages.device)
            linear = view.linear.to(pages.device)
            reached = linear @ ends  # NaN where a row is blank
            low = reached.nan_to_num(torch.inf).amin(dim=2)
            size = reached.nan_to_num(-torch.inf).amax(dim=2) - low
            blank = size.isinf()
            low, size = low.where(~blank, 0.0), size.where(~blank, 1.0)
            scale = (canvas * (1 - 2 * _LEAST_MARGIN) / size).amin(dim=1, keepdim=True).clamp(max=1)
            begin = torch.minimum(_MARGIN * canvas, (canvas - scale * size) / 2) - scale * low
            # from places on the view to places on the page, both of which are from -1 to 1
            back = linear.inverse() / scale[:, :, None]
            source = torch.tensor(pages.shape[:1:-1], device=pages.device)
            turned = back * canvas / source[:, None]
            middle = (back @ (canvas / 2 - begin)[:, :, None])[:, :, 0] * 2 / source - 1
            maps = torch.cat([turned, middle[:, :, None]], dim=2)
            grid = F.affine_grid(maps, [len(pages), 1, *self.canvas], align_corners=False)
            shown = F.grid_sample(pages, grid, align_corners=False)
        return shown.round().to(torch.uint8)


def _ends_of_rows(images: UInt8[Tensor, "B 1 h w"]) -> Float[Tensor, "B 2 2*h"]:
    """Return x and y of the left and right end of each row of ink, at its middle; NaN where it has none."""
    inked = images[:, 0] >= _INK
    height, width = inked.shape[1:]
    columns = torch.arange(width, device=images.device)
    left = columns.where(inked, width).amin(dim=2)
    right = columns.where(inked, -1).amax(dim=2) + 1
    xs = torch.cat([left, right], dim=1).float()
    xs = xs.where(inked.any(dim=2).repeat(1, 2), torch.nan)
    ys = torch.arange(height, device=images.device).repeat(2) + 0.5
    return torch.stack([xs, ys.expand_as(xs).where(~xs.isnan(), torch.nan)], dim=1)


def _weights(readings: Sequence[Reading]) -> list[float]:
    """Return how much each reading counts: the surest 1, others less."""
    sureness = [reading.log_probability / (len(reading.tokens) + 1) for reading in readings]
    return [math.exp(_SURENESS * (its - max(sureness))) for its in sureness]


def voted(readings: Sequence[Reading], most: int) -> Reading:
    """Return the text that most of a page's readings vote for, token by token.

    All are aligned to the surest one. A token's vote is the third power of its probability; a reading that is
    less sure than the surest counts less. A token's confidence is the third root of its share of all votes:
    where all agree, about their mean probability.

    Args:
        most: tokens, after which it is cut off.
    """
    weights = _weights(readings)
    pivot = readings[weights.index(max(weights))].tokens
    # what is written in the place of each of its tokens, and before each of them and its end
    instead = [defaultdict[int | None, float](float) for _ in pivot]
    before = [defaultdict[tuple[int, ...], float](float) for _ in [*pivot, None]]
    for reading, weight in zip(readings, weights, strict=True):
        votes = [weight * confidence**_CONFIDENCE for confidence in reading.confidences]
        for edit in Levenshtein.opcodes(pivot, reading.tokens):
            places = range(edit.src_start, edit.src_end)
            written = slice(edit.dest_start, edit.dest_end)
            if edit.tag == "insert":
                of_all = votes[written]
                before[edit.src_start][tuple(reading.tokens[written])] += sum(of_all) / len(of_all)
                before[edit.src_start][()] -= weight
            elif edit.tag == "delete":  # it is as sure of that as of what comes next
                vote = votes[min(edit.dest_start, len(votes) - 1)] if votes else weight
                for place in places:
                    instead[place][None] += vote
            else:
                new = zip(places, reading.tokens[written], votes[written], strict=True)
                for place, token, its in new:
                    instead[place][token] += its
    total = sum(weights)
    tokens: list[int] = []
    confidences: list[float] = []

    def write(written: Sequence[int], votes: float) -> None:
        tokens.extend(written)
        confidences.extend([min(1.0, votes / total) ** (1 / _CONFIDENCE)] * len(written))

    for place in range(len(before)):
        before[place][()] += total
        write(*max(before[place].items(), key=lambda choice: choice[1]))
        if place < len(pivot):
            likeliest, most_votes = max(instead[place].items(), key=lambda choice: choice[1])
            write([] if likeliest is None else [likeliest], most_votes)
    del tokens[most:], confidences[most:]
    return Reading(tokens, confidences, math.fsum(map(math.log, confidences)))
