"""Training that can be killed anywhere and goes on with the same bits.

    RUN/checkpoints/step_00000120/
        weights.safetensors  the learner's tensors
        state.pt             optimizer, schedule, counters, random states; plain values and tensors
        best.safetensors     the best weights of that moment
        checkpoint.json      version, whose it is, size and hash of the others

A checkpoint is written aside, brought to the disk and renamed; the newest few are kept.
"""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paragraph_ocr import console
from paragraph_ocr.batch import Batch
from paragraph_ocr.errors import Diverged, UserError

FOLDER = "checkpoints"
VERSION = 1

_WEIGHTS, _STATE, _BEST, _LABEL = (
    "weights.safetensors",
    "state.pt",
    "best.safetensors",
    "checkpoint.json",
)


_LEAST_BYTES = 65_536  # free on a disk that is not full


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to end, and it did so in good order."""


def newest_checkpoint(run_folder: Path, *, identity: str) -> Path | None:
    """Return the newest whole checkpoint of a run, None if it has none yet.

    Args:
        identity: of the experiment; a checkpoint of another one is refused.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    found = sorted((run_folder / FOLDER).glob("step_*"), reverse=True)
    for folder in found:
        try:
            _check(folder, identity=identity)
        except _Torn as torn:
            console.warn(f"{folder} is torn ({torn}): going back to the one before it.")
            continue
        return folder
    if found:
        raise UserError(
            f"{run_folder / FOLDER} holds no whole checkpoint. Delete that folder, and the run begins "
            "again from its first step."
        )
    return None


class _Torn(Exception):
    """A checkpoint that was not written to its end, or was damaged since."""


def _check(folder: Path, *, identity: str) -> None:
    """Check that all files of a checkpoint are what was written.

    Raises:
        _Torn: they are not.
        UserError: it is whole, but of another version or another experiment.
    """
    try:
        label = json.loads((folder / _LABEL).read_text())
        version, owner, files = label["version"], label["identity"], label["files"]
        assert isinstance(files, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise _Torn(f"{_LABEL}: {type(error).__name__}") from error
    if version != VERSION:
        raise UserError(
            f"{folder} has version {version}; this code reads {VERSION}. Go on with the code that wrote "
            "it, or start a new run with model.weights=<its run folder>."
        )
    if owner != identity:
        raise UserError(
            f"{folder} belongs to another experiment. Remove it from there, or start a new run with "
            "model.weights=<its run folder>."
        )
    for name in {_WEIGHTS, _STATE, *files}:
        if name not in files or not (folder / name).is_file():
            raise _Torn(f"{name} is missing")
        if _described(folder / name) != files[name]:
            raise _Torn(f"{name} is not what was written")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


class CheckpointFiles(CheckpointIO):
    """Lightning's checkpoints as folders of plain data.

    Args:
        identity: whose they are.
        best: the best weights so far; each checkpoint keeps those of its moment.
    """

    def __init__(self, *, identity: str, best: Path) -> None:
        self.identity, self.best = identity, best

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        folder = Path(path)
        aside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            self._write(checkpoint, aside)
        except BaseException as error:
            full = shutil.disk_usage(folder.parent.parent).free < _LEAST_BYTES
            shutil.rmtree(aside, ignore_errors=True)
            if full:  # which not every writer says
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        shutil.rmtree(folder, ignore_errors=True)  # of a run that went this way before
        aside.rename(folder)
        _to_disk(folder.parent)

    def _write(self, checkpoint: dict[str, Any], aside: Path) -> None:
        weights = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in checkpoint["state_dict"].items()
        }
        save_file(weights, aside / _WEIGHTS)
        torch.save({k: v for k, v in checkpoint.items() if k != "state_dict"}, aside / _STATE)
        if self.best.exists():
            _link(self.best, aside / _BEST)
        files = {file.name: _described(file) for file in sorted(aside.iterdir())}
        label = {"version": VERSION, "identity": self.identity, "files": files}
        (aside / _LABEL).write_text(json.dumps(label, indent=1))
        for file in aside.iterdir():
            _to_disk(file)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        folder = Path(path)
        try:
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            state["state_dict"] = load_file(folder / _WEIGHTS)
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0][:200]
            raise UserError(f"{folder} cannot be read: {first}. Delete that folder.") from error
        return state

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def restore_best(folder: Path, best: Path) -> None:
    """Make the best weights those of the checkpoint's moment, whatever came after it."""
    best.unlink(missing_ok=True)
    if (folder / _BEST).exists():
        _link(folder / _BEST, best)


def _link(source: Path, target: Path) -> None:
    """Give a file that is only ever replaced a second name, or a copy where links are not to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints(pl.Callback):
    """Save the run between two batches, now and then, when somebody asks it to end, and at its end.

    Args:
        folder: of the run.
        every_s: seconds between two checkpoints; None saves only when asked and at the end.
        every_n_steps: optimizer steps between two checkpoints, or None.
        keep: how many are kept.
        limits: how far the run goes; one that came to its end goes on only under others.
        before: called before each; what it brings to safety belongs to the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_s: float | None,
        every_n_steps: int | None,
        keep: int,
        limits: str,
        before: Callable[[], None],
    ) -> None:
        self.folder = folder / FOLDER
        self.every_s, self.every_n_steps, self.keep = every_s, every_n_steps, keep
        self.limits, self.before = limits, before
        self.asked: str | None = None
        """Why the run is to end at the next chance, or None."""
        self.at_work = False
        """Whether it would be noticed if `asked` were set."""
        self.take_signals: Callable[[], Any] = lambda: None
        self._ended_by: str | None = None  # the limits under which it came to its end
        self.metrics: dict[str, float] = {}
        """Of the last validation."""
        self._restored: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"ended_by": self._ended_by, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ended_by, self.metrics = state_dict["ended_by"], state_dict["metrics"]

    def setup(self, trainer: pl.Trainer, learner: pl.LightningModule, stage: str) -> None:
        self.at_work = True

    def teardown(self, trainer: pl.Trainer, learner: pl.LightningModule, stage: str) -> None:
        self.at_work = False

    def on_fit_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if self._ended_by == self.limits:
            trainer.should_stop = True  # which Lightning forgets, if that is what ended it
        self._ended_by = None

    def on_train_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self.take_signals()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, learner: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["between"] = {
            "random": _gathered(trainer, _random_states()),
            "world_size": trainer.world_size,
            "batches_that_stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
        }
        _settle(
            checkpoint["loops"]["fit_loop"],
            int(trainer.num_training_batches),
            validating=trainer.validating,
        )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, learner: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint["between"]
        if self._restored["world_size"] != trainer.world_size:
            console.warn(
                f"The checkpoint is of {self._restored['world_size']} processes, and this run has "
                f"{trainer.world_size}: weights and optimizer go on, the order of the data does not."
            )

    def on_validation_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self._restore(trainer)
        if (
            trainer.world_size > 1
        ):  # they read different numbers of batches, so they agree now or never
            self._leave_if_asked(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        batch: Batch,
        batch_index: int,
        dataloader_index: int = 0,
    ) -> None:
        # reading may take minutes: a run that is asked to end does not wait for it, and begins with it
        # when it goes on
        if trainer.world_size == 1:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        if not self._asked(trainer):
            return
        if trainer.state.fn == "fit" and not trainer.fit_loop.epoch_loop._should_accumulate():
            self.save(trainer)
        raise Interrupted(self.asked)

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        learner: pl.LightningModule,
        batch: Batch,
        batch_index: int,
        dataloader_index: int = 0,
    ) -> None:
        if trainer.world_size == 1:
            self._leave_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, learner: pl.LightningModule, batch: Batch, batch_index: int
    ) -> None:
        # here all of the batch before is done, its validation and the end of its epoch included
        whole_step = batch_index % trainer.accumulate_grad_batches == 0
        if self._restored is not None:
            self._restore(trainer)
        elif whole_step and self._due(trainer):
            self.save(trainer)
        if whole_step and self._asked(trainer):
            raise Interrupted(self.asked)

    def _restore(self, trainer: pl.Trainer) -> None:
        """Bring back, just before it matters, what Lightning changes on its way here."""
        if self._restored is None:
            return
        # the step under which metrics are logged
        trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
        if self._restored["world_size"] == trainer.world_size:
            _set_random_states(self._restored["random"][trainer.global_rank])
        self._restored = None
        self._saved_at = time.monotonic()

    def _asked(self, trainer: pl.Trainer) -> bool:
        """Return whether the run is to end; processes that share it end together."""
        asked = self.asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            self.asked = self.asked or ("another process was asked to end" if asked else None)
        return asked

    def on_train_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self._ended_by = self.limits
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this moment, and remove those that are too old."""
        self.before()
        trainer.save_checkpoint(self.folder / f"step_{trainer.global_step:08d}")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step_*"))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self._saved_at = time.monotonic()

    def _due(self, trainer: pl.Trainer) -> bool:
        steps, step = self.every_n_steps, trainer.global_step
        by_steps = steps is not None and step > 0 and step % steps == 0
        by_time = self.every_s is not None and time.monotonic() - self._saved_at >= self.every_s
        if trainer.world_size > 1:  # their clocks differ, and all must save together
            by_time = trainer.strategy.reduce_boolean_decision(by_time, all=False)
        return by_steps or by_time or self._asked(trainer)


def _settle(fit_loop: dict[str, Any], batches_per_epoch: int, *, validating: bool) -> None:
    """Make Lightning's saved counters those of a loop between two batches, or before a validation.

    Lightning knows a restart at the hooks in which its own callbacks save, and guesses among them from
    counters that differ by one.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    done = batches["total"]["completed"]
    epoch, batch = divmod(done, max(1, batches_per_epoch))
    if validating and batch == 0:  # the epoch is not over yet
        epoch, batch = epoch - 1, batches_per_epoch
    for kind, count in (("total", done), ("current", batch)):
        batches[kind] = dict.fromkeys(batches[kind], count)
    batches["is_last_batch"] = validating and batch == batches_per_epoch
    begun = epoch + (batch > 0)
    counts = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    fit_loop["epoch_progress"] = {"total": dict(counts), "current": dict(counts)}
    if validating:  # as if its first batch were being read: it is read again, and all after it
        first = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        fit_loop["epoch_loop.val_loop.batch_progress"] |= {
            "total": dict(first),
            "current": dict(first),
        }


def _random_states() -> dict[str, Any]:
    """Return the state of every generator that training draws from, as plain values and tensors."""
    kind, keys, *position = np.random.get_state()  # noqa: NPY002  (libraries draw from it)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *position),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *position = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _gathered(trainer: pl.Trainer, states: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all processes, by rank."""
    if trainer.world_size == 1:
        return [states]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, states)
    return gathered


class SkipStep:
    """What to do about gradients that are not finite: leave out the step.

    Raises:
        Diverged: a hundred steps in a row were left out.
    """

    def __init__(self) -> None:
        self._last, self._in_a_row = -1, 0

    def __call__(self, step: int) -> None:
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self._last = step
        console.warn(f"step {step}: a gradient is not finite, and the step is left out.")
        if self._in_a_row == 100:
            raise Diverged(f"No gradient is finite any more since step {step - 99}. {LOWER_RATE}")


class RollBack:
    """What to do about gradients that are not finite: go back to the last checkpoint's weights and
    optimizer, and on with the next batch.

    Raises:
        Diverged: there is no checkpoint, or three times the same one did not help.
    """

    def __init__(self, learner: pl.LightningModule, folder: Path, files: CheckpointFiles) -> None:
        self._learner, self._folder, self._files = learner, folder, files
        self._last: Path | None = None
        self._times = 0

    def __call__(self, step: int) -> None:
        checkpoint = newest_checkpoint(self._folder, identity=self._files.identity)
        self._times = self._times + 1 if checkpoint == self._last else 1
        self._last = checkpoint
        if checkpoint is None or self._times > 3:
            raise Diverged(f"A gradient is not finite at step {step}, again. {LOWER_RATE}")
        console.warn(f"step {step}: a gradient is not finite; back to {checkpoint.name}.")
        state = self._files.load_checkpoint(checkpoint)
        self._learner.load_state_dict(state["state_dict"])
        optimizer = self._learner.trainer.optimizers[0]
        optimizer.load_state_dict(state["optimizer_states"][0])


LOWER_RATE = "Pass a lower optimizer.lr, regularization.gradient_clip=1.0, or trainer.on_nan=skip."


def all_finite(tensors: list[Tensor]) -> bool:
    """Return whether no element is NaN or infinite; waits for a GPU."""
    if not tensors:
        return True
    return bool(torch.stack(torch._foreach_norm(tensors)).sum().isfinite())
