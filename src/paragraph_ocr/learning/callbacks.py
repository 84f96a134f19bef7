"""What happens beside learning: best weights kept, speed measured, progress shown, an early end."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import TaskID
from safetensors.torch import save_file

from paragraph_ocr import console, timeline
from paragraph_ocr.batch import Batch
from paragraph_ocr.errors import Diverged
from paragraph_ocr.learning.checkpoint import LOWER_RATE
from paragraph_ocr.learning.learner import Learner


def score(trainer: pl.Trainer) -> tuple[float, float]:
    """Return (val/cer, val/loss) of the last validation: less is better, the loss breaks ties."""
    metrics = trainer.callback_metrics
    return float(metrics["val/cer"]), float(metrics["val/loss"])


class KeepWeights(pl.Callback):
    """Write `best.safetensors` (lowest val/cer) and `last.safetensors`, each renamed into place.

    With averaged weights they are the average.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best: tuple[float, float] | None = None
        self.validated_step: int | None = None

    @property
    def best_path(self) -> Path:
        return self.folder / "best.safetensors"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.validated_step = state_dict["best"], state_dict["validated_step"]

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        self._save(learner, "last.safetensors")
        if self.best is None or score(trainer) < self.best:
            self.best = score(trainer)
            self._save(learner, "best.safetensors")

    def on_fit_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(learner, "last.safetensors")

    def _save(self, learner: pl.LightningModule, name: str) -> None:
        assert isinstance(learner, Learner)
        aside = self.folder / f".{name}.part"
        save_file(learner.kept.weights(), aside)
        aside.replace(self.folder / name)


class StopWhenRead(pl.Callback):
    """End training once every validated paragraph has been read without an error."""

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if float(trainer.callback_metrics["val/exact"]) == 1.0:
            trainer.should_stop = True


class StopWhenDiverged(pl.Callback):
    """End training once the loss is no number any more.

    Raises:
        Diverged: then.
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return  # reading a metric waits for the GPU
        loss = float(trainer.callback_metrics["train/loss"])
        if not math.isfinite(loss):
            raise Diverged(f"train/loss is {loss} at step {trainer.global_step}. {LOWER_RATE}")


class Watch(pl.Callback):
    """End training early when told to.

    Args:
        metric: what the judge is shown, or None.
        every: "epoch", after each validation, or "step", at each step that is logged.
        judge: takes epochs or steps done and the metric's value; returns whether to stop.
    """

    def __init__(
        self, metric: str | None, *, every: str, judge: Callable[[int, float], bool] | None
    ) -> None:
        self.metric, self.every, self.judge = metric, every, judge
        self.pruned = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        if self.every == "step" and trainer.global_step % trainer.log_every_n_steps == 0:
            self._show(trainer, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if self.every == "epoch" and not trainer.sanity_checking:
            self._show(trainer, trainer.current_epoch + 1)

    def _show(self, trainer: pl.Trainer, done: int) -> None:
        if self.judge is None or self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        if not math.isfinite(value):
            raise Diverged(f"{self.metric} is {value} after {done} {self.every}s. {LOWER_RATE}")
        if self.judge(done, value):
            self.pruned = trainer.should_stop = True


class Measure(pl.Callback):
    """Log the learning rate, training images a second and the GPU's peak memory."""

    def __init__(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._began: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, learner: pl.LightningModule, batch: Batch, batch_index: int
    ) -> None:
        # from start to start, so that waiting for data counts; validation does not
        now = time.perf_counter()
        if self._began is not None:
            self._seconds += now - self._began
        self._began = now

    def on_validation_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self._began = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        self._images += len(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps:
            return
        measured = {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if self._seconds:
            measured["images_per_second"] = self._images / self._seconds
            self._images, self._seconds = 0, 0.0
        if torch.cuda.is_available():
            measured["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=trainer.global_step)


class MarkFirstStep(pl.Callback):
    """Note in the timeline when the first training step is done, also by a GPU."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        if trainer.global_step == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            timeline.mark("first step")


class TrainingProgress(ProgressBar):
    """One bar over the whole run: steps, speed, and the latest loss and val/cer."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = console.training_bar()
        self._task: TaskID | None = None
        self._images = 0

    def disable(self) -> None:
        """Lightning calls this on every process but the first."""
        self._bar.disable = True

    def on_train_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._task = self._bar.add_task(
            "train", total=None if total == float("inf") else int(total), rate="", metrics=""
        )
        self._began = time.perf_counter()
        self._bar.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_index: int,
    ) -> None:
        self._images += len(batch) * trainer.world_size
        self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if self._task is not None:
            self._bar.update(self._task, description="validate")

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if self._task is not None:
            self._bar.update(self._task, description="train")
            self._show(trainer)
        if not console.console.is_terminal and not trainer.sanity_checking:
            cer, loss = score(trainer)
            console.say(f"step {trainer.global_step}  val/loss {loss:.3f}  val/cer {cer:.3f}")

    def on_train_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self._bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, learner: pl.LightningModule, exception: BaseException
    ) -> None:
        self._bar.stop()

    def _show(self, trainer: pl.Trainer) -> None:
        if self._bar.disable or self._task is None or self._bar.tasks[0].finished:
            return
        if trainer.global_step % trainer.log_every_n_steps and trainer.training:
            return  # reading a metric waits for the GPU
        metrics = trainer.callback_metrics
        shown = [f"{k} {float(metrics[k]):.3f}" for k in ("train/loss", "val/cer") if k in metrics]
        rate = self._images / (time.perf_counter() - self._began)
        self._bar.update(
            self._task,
            completed=trainer.global_step,
            rate=f"{rate:.0f} images/s",
            metrics="  ".join(shown),
        )
