"""The training step as a CUDA graph: hundreds of kernels, launched at once.

A small model's kernels run faster than Python can launch them, on an H100 by ten times for a batch of 16.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from paragraph_ocr.errors import UserError

PADDED_LENGTH = 64
"""Labels are padded to a multiple of this, so that few lengths are left to record."""

_MOST = 24
"""Shapes recorded at most; further ones are computed step by step."""

Loss = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From images "B 1 H W", tokens "B L" and sizes "B 2" to a loss and the number of its tokens."""


class RecordedLoss:
    """A loss whose forward and backward pass are recorded for each shape of batch, and then replayed.

    The first batch of a shape is computed plainly, in case that no other follows; and so is what does
    not lie on a GPU. What is computed is the same. Random numbers go on as the graphs consume them, and
    statistics in buffers are updated.

    Args:
        module: holds the parameters and buffers that the loss uses.
        pad: the token that never counts.
        longest: tokens that the module takes at most.
    """

    def __init__(self, loss: Loss, module: nn.Module, *, pad: int, longest: int) -> None:
        self._loss, self._module, self._pad, self._longest = loss, module, pad, longest
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None

    def __call__(
        self,
        images: UInt8[Tensor, "B 1 H W"],
        tokens: Int[Tensor, "B L"],
        sizes: Int[Tensor, "B 2"] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return loss and number of tokens; its gradient is that of the plain loss."""
        if not images.is_cuda:
            return self._loss(images, tokens, sizes)
        # inputs are all tokens but the last, so one more than a multiple
        length = PADDED_LENGTH * math.ceil((tokens.shape[1] - 1) / PADDED_LENGTH) + 1
        short = max(0, min(length, self._longest) - tokens.shape[1])
        tokens = F.pad(tokens, (0, short), value=self._pad)
        shape = (images.shape, tokens.shape, sizes is None)
        recording = self._recordings.get(shape)
        if recording is None:
            self._seen[shape] += 1
            full = len(self._recordings) == _MOST
            if self._seen[shape] == 1 or full:
                return self._loss(images, tokens, sizes)
            recording = self._record((images, tokens, sizes))
            self._recordings[shape] = recording
        loss, count = _Replay.apply(recording, (images, tokens, sizes), *recording.parameters)
        return loss, count

    def _record(self, batch: Sequence[Tensor | None]) -> "_Recording":
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Recording(self._loss, self._module, batch, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # after which the device's random numbers are spoilt
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(
                f"trainer.cuda_graphs=true: this model's step cannot be recorded ({first[0]}). "
                "Pass trainer.cuda_graphs=false."
            ) from error


class _Recording:
    """One shape's graph, with the tensors that it reads from and writes to."""

    def __init__(
        self, loss: Loss, module: nn.Module, batch: Sequence[Tensor | None], pool: Any
    ) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._batch = [None if tensor is None else tensor.clone() for tensor in batch]
        self.replays = 0
        device = self.parameters[0].device
        wrapped = _Called(loss, module)

        def step() -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
            # leaves of their own: those of an earlier loss that is still alive belong to another stream
            own: dict[str, Tensor] = {
                name: nn.Parameter(p.detach())
                for name, p in wrapped.named_parameters()
                if p.requires_grad
            }
            # a cast that autocast had kept from before would not be part of the graph
            autocast = torch.is_autocast_enabled(device.type)
            precision = torch.get_autocast_dtype(device.type)
            with torch.autocast(device.type, precision, enabled=autocast, cache_enabled=False):
                total, count = functional_call(wrapped, own, tuple(self._batch))
            gradients = torch.autograd.grad(total, list(own.values()), allow_unused=True)
            return total.detach(), count, gradients

        buffers = list(module.buffers())
        before = [buffer.clone() for buffer in buffers]
        random = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries take their memory
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.loss, self.count, self.gradients = step()
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.copy_(kept)
        torch.cuda.set_rng_state(random, device)

    def replay(self, batch: Sequence[Tensor | None]) -> None:
        for place, tensor in zip(self._batch, batch, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        self._graph.replay()
        self.replays += 1


class _Called(nn.Module):
    """A loss as the forward pass of a module that holds the module it uses."""

    def __init__(self, loss: Loss, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        return self._loss(*batch)


class _Replay(torch.autograd.Function):
    """A replayed loss, with the gradients that came with it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, recording: _Recording, batch: Sequence[Tensor | None], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        recording.replay(batch)
        ctx.recording, ctx.replays = recording, recording.replays
        loss, count = recording.loss.clone(), recording.count.clone()
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> Any:  # type: ignore[override]
        recording = ctx.recording
        assert recording.replays == ctx.replays, "the gradients are those of a later batch"
        some = [gradient for gradient in recording.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(some, slope))
        return None, None, *(None if g is None else next(scaled) for g in recording.gradients)
