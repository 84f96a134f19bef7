"""The training step as a CUDA graph: hundreds of kernels, launched at once.

A small model's kernels run faster than Python can launch them, on an H100 by ten times for a batch of 16.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from paragraph_ocr.cuda_graph import recording, warm_up
from paragraph_ocr.errors import UserError

PADDED_LENGTH = 64
"""Labels are padded to a multiple of this, so that few lengths are left to record."""

_MOST = 64
"""Shapes recorded at most; further ones are computed step by step."""

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""From images "B 1 H W", tokens "B L", sizes "B 2" and places of letters "B L 2" to a loss, and to figures
without a gradient that are told beside it."""


class RecordedLoss:
    """A loss whose forward and backward pass are recorded for each shape of batch, and then replayed.

    The first batch of a shape is not recorded, in case that no other follows, but computed by the same
    operations: the same bits where these are deterministic. What does not lie on a GPU is left to
    autograd. Random numbers go on as the graphs consume them, and statistics in buffers are updated.

    Args:
        module: holds the parameters and buffers that the loss uses.
        pad: the token that never counts.
        longest: tokens that the module takes at most.
    """

    def __init__(self, loss: Loss, module: nn.Module, *, pad: int, longest: int) -> None:
        self._loss, self._pad, self._longest = loss, pad, longest
        self._step = _Step(loss, module)
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None

    def __call__(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None,
        letters: Float[Tensor, "B L 2"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the figures beside it; its gradient is that of the plain loss."""
        if not images.is_cuda:
            return self._loss(images, tokens, sizes, letters)
        # inputs are all tokens but the last, so one more than a multiple
        length = PADDED_LENGTH * math.ceil((tokens.shape[1] - 1) / PADDED_LENGTH) + 1
        short = max(0, min(length, self._longest) - tokens.shape[1])
        tokens = F.pad(tokens, (0, short), value=self._pad)
        if letters is not None:
            letters = F.pad(letters, (0, 0, 0, short), value=torch.nan)
        shape = (images.shape, tokens.shape, sizes is None, letters is None)
        batch = (images, tokens, sizes, letters)
        compute: _Compute = self._step
        recorded = self._recordings.get(shape)
        if recorded is not None:
            compute = recorded
        elif self._seen[shape] and len(self._recordings) < _MOST:
            compute = self._recordings[shape] = self._record(batch)
        self._seen[shape] += 1
        loss, figures = _WithGradients.apply(compute, batch, *self._step.parameters.values())
        return loss, figures

    def forget(self) -> None:
        """Give back the memory of what was recorded; where weights move, it must be recorded anew."""
        if self._recordings:
            torch.cuda.synchronize()  # one may still be replayed
        self._seen.clear()
        self._recordings.clear()
        self._pool = None

    def _record(self, batch: Sequence[Tensor | None]) -> "_Recording":
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        random = torch.cuda.get_rng_state()
        try:
            return _Recording(self._step, batch, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # the generator still believes itself to be recorded; others in this process shall go on
            generator = torch.Generator("cuda")
            generator.set_state(random)
            generators = torch.cuda.default_generators
            generators[torch.cuda.current_device()].graphsafe_set_state(generator)
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(
                f"trainer.cuda_graphs=true: this model's step cannot be recorded ({first[0]}). "
                "Pass trainer.cuda_graphs=false."
            ) from error


@dataclass
class _Computed:
    loss: Tensor
    figures: Tensor
    gradients: tuple[Tensor | None, ...]
    """One for each parameter; None where the loss does not depend on it."""

    overwritten: bool = False


_Compute = Callable[[Sequence[Tensor | None]], _Computed]


class _Step:
    """From a batch to loss, figures, and gradients."""

    def __init__(self, loss: Loss, module: nn.Module) -> None:
        self.module = module
        self._called = _Called(loss, module)

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._called.named_parameters() if p.requires_grad}

    def __call__(self, batch: Sequence[Tensor | None]) -> _Computed:
        # leaves of their own: those of an earlier loss that is still alive belong to another stream
        own: dict[str, Tensor] = {
            name: nn.Parameter(p.detach()) for name, p in self.parameters.items()
        }
        with torch.enable_grad(), _autocast_without_cache():
            total, figures = functional_call(self._called, own, tuple(batch))
        found = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        # one that repeats its memory, as a sum's does, would keep all from being scaled at once
        gradients = tuple(None if g is None else _dense(g) for g in found)
        return _Computed(total.detach(), figures, gradients)


def _dense(gradient: Tensor) -> Tensor:
    """Return the gradient in memory of its own."""
    overlaps = 0 in gradient.stride() and gradient.numel() > 0
    return gradient.contiguous() if overlaps else gradient


def _autocast_without_cache() -> torch.autocast:
    """Return autocast as it stands; a cast kept from before would not be part of a graph."""
    enabled, precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", precision, enabled=enabled, cache_enabled=False)


class _Recording:
    """One shape's graph, with the tensors that it reads from and writes to."""

    def __init__(self, step: _Step, batch: Sequence[Tensor | None], pool: Any) -> None:
        self._batch = [None if tensor is None else tensor.clone() for tensor in batch]
        buffers = list(step.module.buffers())
        before = [buffer.clone() for buffer in buffers]
        random = torch.cuda.get_rng_state()
        warm_up(lambda: step(self._batch))
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph, pool=pool):
            self._latest = step(self._batch)
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.copy_(kept)
        torch.cuda.set_rng_state(random)

    def __call__(self, batch: Sequence[Tensor | None]) -> _Computed:
        """Return what the next call overwrites."""
        self._latest.overwritten = True
        self._latest = replace(self._latest, overwritten=False)
        for place, tensor in zip(self._batch, batch, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._latest


class _Called(nn.Module):
    """A loss as the forward pass of a module that holds the module it uses."""

    def __init__(self, loss: Loss, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        return self._loss(*batch)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed along with it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        compute: _Compute,
        batch: Sequence[Tensor | None],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        computed = compute(batch)
        loss, figures = computed.loss.clone(), computed.figures.clone()
        ctx.computed = computed
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> Any:  # type: ignore[override]
        computed: _Computed = ctx.computed
        assert not computed.overwritten, "the gradients are those of a later batch"
        some = [gradient for gradient in computed.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(some, slope))
        return None, None, *(None if g is None else next(scaled) for g in computed.gradients)
