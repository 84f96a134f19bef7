"""Free-running reading: the decoder writes token after token over a cache, each row to its own end."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paragraph_ocr.model.decoder import Cache, Decoder

_HAS_TRITON = importlib.util.find_spec("triton") is not None


_ROWS_FOR_ONE_THREAD = 4
"""Rows up to which a step's operations take less time than threads need to meet, 30 us each."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """Take the likeliest token at each step.

    `ignore_end` goes on to the maximum length whatever is written, for measuring speed.
    """

    ignore_end: bool = False


@dataclass(frozen=True, slots=True)
class Beam:
    """Keep `width` texts side by side; the best total wins.

    Totals are log-probabilities divided by ((5 + length) / 6) ** length_penalty (Wu et al. 2016).
    """

    width: int
    length_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read from one page."""

    tokens: list[int]
    """Without start and end."""
    confidences: list[float]
    """Probability of each token given those before it."""
    log_probability: float
    """Of the whole, the end included where it was reached."""
    others: tuple["Reading", ...] = ()
    """What else a beam has found, the likelier first; theirs are none."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    start: int
    end: int
    pad: int


@torch.no_grad()
def generate(
    decoder: Decoder,
    memory: Float[Tensor, "B M D"],
    memory_mask: Bool[Tensor, "B M"] | None,
    *,
    special: SpecialTokens,
    decoding: Greedy | Beam,
    max_length: int,
) -> list[Reading]:
    """Return a reading of each page, of at most max_length tokens with start and end."""
    if isinstance(decoding, Greedy):
        return _greedy(decoder, memory, memory_mask, special, decoding, max_length)
    cache = decoder.start(memory, memory_mask, max_length=max_length)
    few = memory.device.type == "cpu" and len(memory) <= _ROWS_FOR_ONE_THREAD
    # cuDNN's attention makes a plan for each new length, 70 ms each, and here each step is one
    with (
        _one_thread() if few else nullcontext(),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        return _beam(decoder, cache, len(memory), special, decoding, max_length)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _greedy(
    decoder: Decoder,
    memory: Tensor,
    memory_mask: Tensor | None,
    special: SpecialTokens,
    decoding: Greedy,
    max_length: int,
) -> list[Reading]:
    written, scores = _steps_for(decoder, memory)(
        decoder,
        memory,
        memory_mask,
        start=special.start,
        end=None if decoding.ignore_end else special.end,
        pad=special.pad,
        max_length=max_length,
    )
    return [
        _reading(row, score, special)
        for row, score in zip(written[:, : max_length - 1].tolist(), scores.tolist(), strict=True)
    ]


def _steps_for(decoder: Decoder, memory: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what reads fastest here: tokens of each page, and their log-probabilities."""
    if memory.device.type == "cpu":
        from paragraph_ocr.model import cpu_steps

        return cpu_steps.read_greedily
    if memory.device.type == "cuda" and _HAS_TRITON:
        from paragraph_ocr.model import cluster_steps, gpu_steps

        if cluster_steps.serves(decoder, memory):
            return cluster_steps.read_greedily
        return gpu_steps.read_greedily
    return read_greedily_by_cache


def read_greedily_by_cache(
    decoder: Decoder,
    memory: Float[Tensor, "B M D"],
    memory_mask: Bool[Tensor, "B M"] | None,
    *,
    start: int,
    end: int | None,
    pad: int,
    max_length: int,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Return what `cpu_steps.read_greedily` does, on any device, by the decoder's own operations."""
    cache = decoder.start(memory, memory_mask, max_length=max_length)
    pages = torch.arange(len(memory), device=memory.device)
    written = torch.full((len(pages), max_length - 1), pad, device=memory.device)
    scores = torch.zeros(len(pages), max_length - 1, device=memory.device)
    tokens = torch.full_like(pages, start)
    for step in range(max_length - 1):
        logs = decoder.step(tokens, cache).float().log_softmax(dim=-1)
        scores[pages, step], tokens = logs.max(dim=-1)
        written[pages, step] = tokens
        if end is None:
            continue
        going = (tokens != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(pages):
            pages, tokens = pages[going], tokens[going]
            cache.keep(going)
            cache.take(going)
    return written, scores


def _reading(tokens: list[int], scores: list[float], special: SpecialTokens) -> Reading:
    length = tokens.index(special.end) if special.end in tokens else len(tokens)
    confidences = [math.exp(score) for score in scores[:length]]
    return Reading(tokens[:length], confidences, sum(scores[: length + 1]))


_History = tuple[list[int], list[float]]
"""Tokens of a text so far, and their log-probabilities."""


def _beam(
    decoder: Decoder,
    cache: Cache,
    batch: int,
    special: SpecialTokens,
    decoding: Beam,
    max_length: int,
) -> list[Reading]:
    device, width = cache.crosses[0].device, decoding.width
    cache.share(width)
    pages = list(range(batch))  # still being read, in the order of the rows
    alive: list[list[_History | None]] = [[([], []), *[None] * (width - 1)] for _ in pages]
    totals = torch.full((batch, width), -torch.inf, device=device)
    totals[:, 0] = 0.0  # the beams of a page start out equal: only the first counts
    tokens = torch.full((batch * width,), special.start, device=device)
    finished: list[list[tuple[float, Reading]]] = [[] for _ in range(batch)]

    def finish(page: int, ids: list[int], scores: list[float]) -> None:
        reading = _reading(ids, scores, special)
        norm = ((5 + len(ids)) / 6) ** decoding.length_penalty
        finished[page].append((sum(scores) / norm, reading))

    for _ in range(max_length - 1):
        logs = decoder.step(tokens, cache).float().log_softmax(dim=-1).unflatten(0, (-1, width))
        num_tokens = logs.shape[-1]
        # twice the width: at most `width` of them end, so enough go on
        best, flat = (totals[..., None] + logs).flatten(1).topk(min(2 * width, width * num_tokens))
        logs_list = logs.flatten(1).gather(1, flat).tolist()
        kept_rows, kept_tokens, kept_totals, kept_alive, kept_pages = [], [], [], [], []
        for index, page in enumerate(pages):
            beams: list[tuple[int, int, float, _History | None]] = []
            for rank, (total, choice) in enumerate(
                zip(best[index].tolist(), flat[index].tolist(), strict=True)
            ):
                beam, token = divmod(choice, num_tokens)
                history = alive[index][beam]
                if history is None or total == -float("inf") or len(beams) == width:
                    continue
                ids, scores = [*history[0], token], [*history[1], logs_list[index][rank]]
                if token != special.end:
                    beams.append((index * width + beam, token, total, (ids, scores)))
                elif rank < width:
                    finish(page, ids, scores)
            if len(finished[page]) >= width or not beams:
                continue
            beams += [(beams[0][0], beams[0][1], -float("inf"), None)] * (width - len(beams))
            kept_pages.append(page)
            kept_alive.append([beam[3] for beam in beams])
            kept_rows += [beam[0] for beam in beams]
            kept_tokens += [beam[1] for beam in beams]
            kept_totals.append([beam[2] for beam in beams])
        if len(kept_pages) < len(pages):
            kept = [index for index, page in enumerate(pages) if page in kept_pages]
            cache.keep(torch.tensor(kept, dtype=torch.long, device=device))
        pages, alive = kept_pages, kept_alive
        if not pages:
            break
        cache.take(torch.tensor(kept_rows, device=device))
        tokens = torch.tensor(kept_tokens, device=device)
        totals = torch.tensor(kept_totals, device=device)
    for page, histories in zip(pages, alive, strict=True):
        for history in histories:  # cut off by max_length
            if history is not None:
                finish(page, *history)
    return [_best(found) for found in finished]


def _best(found: list[tuple[float, Reading]]) -> Reading:
    """Return the reading of the highest total, with the others beside it."""
    best, *others = [reading for _, reading in sorted(found, key=lambda pair: -pair[0])]
    return replace(best, others=tuple(others))
