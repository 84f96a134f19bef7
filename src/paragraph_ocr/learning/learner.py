"""How a recognizer learns: teacher forcing to train, loss and free-running reading to validate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Int
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paragraph_ocr.batch import Batch
from paragraph_ocr.learning.checkpoint import all_finite
from paragraph_ocr.learning.graphs import RecordedLoss
from paragraph_ocr.learning.processes import send_buffers
from paragraph_ocr.metrics import ReadingErrors, TokenLoss
from paragraph_ocr.model.generate import Greedy
from paragraph_ocr.model.reader import Letters, Reader, compiled_for
from paragraph_ocr.model.vote import Vote
from paragraph_ocr.vocabulary import SPECIAL_TOKENS, Vocabulary


@dataclass(frozen=True, slots=True)
class Sample:
    """A paragraph that was read in validation."""

    row: int
    image: Tensor  # UInt8 "H W" on the CPU, 0 is paper
    truth: str
    reading: str


class TrainingSums(NamedTuple):
    """What a batch's cost is made of, each summed over its tokens."""

    tokens: Tensor
    """How many they are."""
    loss: Tensor
    guidance: Tensor


class Learner(pl.LightningModule):
    """A recognizer with its optimizer, augmentation and metrics.

    Args:
        schedule: makes the learning-rate schedule from the optimizer, the number of its steps, and what
            returns the share of the training's time that is gone; either is None without such a limit.
        augment: pages, places of letters (or None) and sizes (or None) to other pages and places.
        calm_augment: takes its place once the share `calm_after` of the training is gone; None never.
        decoding: how validation and test read; see `Reader.read`.
        max_length: tokens that a reading may have.
        guidance: weight of what `Reader.teach` says of letters, where a batch knows their places.
        max_loss_to_read: batches with a higher loss are not read, and count as wholly unread; None reads all.
        num_samples: paragraphs of each validation kept in `samples`.
        ema: share of the averaged weights that an optimizer step keeps; they are what validation reads
            with and what is kept. 0 keeps no average.
        compile: augmentation and teacher-forced pass in training by torch.compile.
        canvas: see `Reader.compiled`.
        cuda_graphs: record the training step as CUDA graphs (one process, no loss scaling).
        on_not_finite: told the number of an optimizer step whose gradients are not finite, which then
            changes nothing; None does not look, because looking waits for a GPU.
    """

    def __init__(
        self,
        recognizer: Reader,
        vocabulary: Vocabulary,
        *,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[torch.optim.Optimizer, int | None, Callable[[], float] | None], Any],
        augment: Callable[..., tuple[Tensor, Tensor | None]],
        calm_augment: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        calm_after: float = 1.0,
        decoding: Any,
        max_length: int,
        max_loss_to_read: float | None,
        label_smoothing: float,
        token_noise: float,
        guidance: float = 0.0,
        num_samples: int,
        ema: float = 0.0,
        on_not_finite: Callable[[int], None] | None = None,
        compile: bool = False,
        canvas: tuple[int, int] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.recognizer = recognizer
        self.vocabulary = vocabulary
        self.decoding = decoding
        self.max_length = max_length
        self.max_loss_to_read = max_loss_to_read
        self.label_smoothing = label_smoothing
        self.token_noise = token_noise
        self.guidance = guidance
        self.num_samples = num_samples
        stages = ("val", "test")
        self.errors = nn.ModuleDict({stage: ReadingErrors() for stage in stages})
        self.losses = nn.ModuleDict({stage: TokenLoss() for stage in stages})
        self.samples: list[Sample] = []
        self.optimizer, self._schedule = optimizer, schedule
        # plain attributes: the compiled module must not add its weights a second time
        self._teach: Callable[..., tuple[Tensor, Tensor | None]] = recognizer.teach
        self._augmented, self._calm_augment = augment, calm_augment
        self.calm_after = calm_after
        if compile:
            compiled = torch.compile if canvas is None else partial(compiled_for, canvas)
            self._teach = recognizer.compiled(canvas=canvas)
            self._augmented = compiled(augment)
            self._calm_augment = None if calm_augment is None else compiled(calm_augment)
        self._training_loss: Callable[..., tuple[Tensor, Tensor]] = (
            RecordedLoss(self._loss, recognizer, pad=vocabulary.pad, longest=max_length)
            if cuda_graphs
            else self._loss
        )
        self._window: list[Tensor] = []
        self.on_not_finite = on_not_finite
        self.average: AveragedModel | None = None
        if ema:
            average = get_ema_multi_avg_fn(ema)
            self.average = AveragedModel(recognizer, multi_avg_fn=average, use_buffers=True)
            self.average.requires_grad_(False)

    @property
    def kept(self) -> Reader:
        """The recognizer whose weights are validated and kept: the average, if there is one."""
        kept = self.recognizer if self.average is None else self.average.module
        assert isinstance(kept, Reader)
        return kept

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches
        total_steps = int(steps) if math.isfinite(steps) else None
        schedule = self._schedule(self.optimizer, total_steps, _time_share(self.trainer))
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Give each process random numbers of its own: all were seeded alike, to build one model."""
        rank = self.trainer.global_rank
        if rank:
            seed = np.random.SeedSequence([torch.initial_seed(), rank]).generate_state(1)
            torch.manual_seed(int(seed[0]))

    def on_fit_end(self) -> None:
        """Forget recorded steps: Lightning takes the weights off the GPU."""
        if isinstance(self._training_loss, RecordedLoss):
            self._training_loss.forget()

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Augment less towards the end, so that the last steps are on pages as they are read."""
        if self._calm_augment is not None and self._progress() >= self.calm_after:
            self._augmented, self._calm_augment = self._calm_augment, None
            if isinstance(self._training_loss, RecordedLoss):
                self._training_loss.forget()

    def _progress(self) -> float:
        """Return how much of the training is, by its steps or its time, whichever is further."""
        steps, time_share = self.trainer.estimated_stepping_batches, _time_share(self.trainer)
        by_steps = self.trainer.global_step / steps if math.isfinite(steps) else 0.0
        return by_steps if time_share is None else max(by_steps, time_share())

    def training_loss(self, batch: Batch) -> tuple[Tensor, TrainingSums]:
        """Return the cost of a training batch, augmented, summed over its tokens, and what it is made of."""
        letters = batch.letters if self.guidance else None
        cost, sums = self._training_loss(batch.images, batch.tokens, batch.sizes, letters)
        return cost, TrainingSums(*sums.unbind())

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Return what is to fall, and the mean loss of the tokens, which callbacks are given."""
        cost, sums = self.training_loss(batch)
        sums = self._over_processes(sums)
        count = sums.tokens
        mean = sums.loss / count
        # not for Lightning's progress bar: it would wait for the GPU in every step
        self.log("train/loss", mean, batch_size=len(batch))
        if self.guidance and batch.letters is not None:
            self.log("train/guidance", sums.guidance / count, batch_size=len(batch))
        cost = cost * self.trainer.world_size  # the mean of the processes' gradients is their sum
        if self.trainer.accumulate_grad_batches > 1:
            self._window.append(count)
            count = self._window[0]
        return {"loss": cost / count, "train/loss": mean}

    def _loss(
        self, images: Tensor, tokens: Tensor, sizes: Tensor | None, places: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the cost of a batch summed over its tokens, and `TrainingSums` as one tensor."""
        # in float32, so that mixed precision sees the very pages that full precision does
        with torch.autocast(images.device.type, enabled=False):
            images, places = self._augmented(images, places, sizes)
        inputs = add_token_noise(
            tokens[:, :-1],
            share=self.token_noise,
            first=len(SPECIAL_TOKENS),
            num_tokens=len(self.vocabulary),
        )
        targets = tokens[:, 1:]
        letters = None if places is None else Letters(targets, places[:, 1:])
        logits, guidance = self._teach(images, inputs, sizes, letters)
        loss, count = self.recognizer.loss(logits, targets, label_smoothing=self.label_smoothing)
        guidance = torch.zeros_like(loss) if guidance is None else guidance
        sums = torch.stack([count.to(loss.dtype), loss.detach(), guidance.detach()])
        return loss + self.guidance * guidance, sums

    def _over_processes(self, sums: TrainingSums) -> TrainingSums:
        """Return those of this step's batches over all processes."""
        if self.trainer.world_size == 1:
            return sums
        total = self.trainer.strategy.reduce(torch.stack(sums).double(), reduce_op="sum")
        return TrainingSums(*total.to(sums.loss.dtype).unbind())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weigh accumulated gradients, and leave out those that would spoil the weights."""
        if self._window:
            self._weigh_window()
        if self.on_not_finite is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if not all_finite(gradients):
                self.zero_grad(set_to_none=True)  # without gradients the step changes nothing
                self.on_not_finite(self.trainer.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients; Lightning would refuse a fused optimizer."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if self.average is not None:
            self.average.update_parameters(self.recognizer)

    def _weigh_window(self) -> None:
        """Make accumulated gradients those of one batch that holds all the tokens.

        Counts are those of all processes. Lightning has divided each part by the number of parts, which
        would weigh the tokens of a part with few of them more.
        """
        factor = self._window[0] * self.trainer.accumulate_grad_batches / sum(self._window)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        self._window.clear()

    def on_validation_epoch_start(self) -> None:
        self.samples.clear()
        if self.trainer.world_size > 1:
            send_buffers(self)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_errors("val")

    def on_test_epoch_end(self) -> None:
        self._log_errors("test")

    def read(self, batch: Batch, *, stage: Literal["val", "test"] = "test") -> list[str]:
        """Return the free-running readings of a batch; validation reads each page once."""
        decoding = self.decoding
        if stage == "val" and isinstance(decoding, Vote):
            decoding = Greedy()
        readings = self.kept.read(
            batch.images, batch.sizes, decoding=decoding, max_length=self.max_length
        )
        return [self.vocabulary.decode(reading.tokens) for reading in readings]

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> None:
        # not compiled, which for so little would not pay
        logits = self.kept.forward(batch.images, batch.tokens[:, :-1], batch.sizes)
        loss, count = self.recognizer.loss(logits, batch.tokens[:, 1:], label_smoothing=0.0)
        self.losses[stage].update(loss, count)
        truths = [self.vocabulary.decode(row) for row in batch.tokens[:, 1:].tolist()]
        # a model that hardly knows the next character writes to the last token, and nothing readable
        most = self.max_loss_to_read
        hopeless = most is not None and bool(loss / count > most)
        readings = [""] * len(batch) if hopeless else self.read(batch, stage=stage)
        self.errors[stage].update(readings, truths)
        if stage == "val" and self.trainer.is_global_zero:
            for index in range(min(len(batch), self.num_samples - len(self.samples))):
                image = batch.images[index, 0].cpu()
                row = int(batch.rows[index])
                self.samples.append(Sample(row, image, truths[index], readings[index]))

    def _log_errors(self, stage: str) -> None:
        figures = {"loss": self.losses[stage].compute(), **self.errors[stage].compute()}
        self.losses[stage].reset()
        self.errors[stage].reset()
        for name, value in figures.items():
            # compute() has summed over all processes already
            self.log(f"{stage}/{name}", value, rank_zero_only=False)


def _time_share(trainer: pl.Trainer) -> Callable[[], float] | None:
    """Return what says which share of the training's time is gone; None if it has no limit."""
    for timer in trainer.callbacks:
        if isinstance(timer, Timer) and timer.time_remaining() is not None:
            return partial(_share_gone, timer)
    return None


def _share_gone(timer: Timer) -> float:
    gone, left = timer.time_elapsed(), timer.time_remaining()
    assert left is not None
    return gone / max(1e-9, gone + left)


def add_token_noise(
    tokens: Int[Tensor, "B L"], *, share: float, first: int, num_tokens: int
) -> Int[Tensor, "B L"]:
    """Return the tokens with a share of the characters replaced by random ones.

    A decoder whose past may be wrong has to look at the page. Special tokens (below `first`) stay.
    """
    if share == 0:
        return tokens
    chosen = (torch.rand(tokens.shape, device=tokens.device) < share) & (tokens >= first)
    return torch.where(chosen, torch.randint_like(tokens, first, num_tokens), tokens)
