"""One run from start to finish: build, fit, test, report."""

import json
import logging
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from paragraph_ocr import build, build_model, console, signals, timeline
from paragraph_ocr.config import Experiment
from paragraph_ocr.data.curriculum import CurriculumDataModule
from paragraph_ocr.ends import explain_end
from paragraph_ocr.errors import UserError
from paragraph_ocr.learning.callbacks import (
    KeepWeights,
    MarkFirstStep,
    Measure,
    StopWhenDiverged,
    StopWhenRead,
    TrainingProgress,
    Watch,
)
from paragraph_ocr.learning.checkpoint import (
    CheckpointFiles,
    Checkpoints,
    RollBack,
    SkipStep,
    newest_checkpoint,
    restore_best,
)
from paragraph_ocr.learning.curriculum import FollowCurriculum
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.learning.processes import Processes
from paragraph_ocr.quantised import quantise, restore
from paragraph_ocr.resume import Unfinished, find_unfinished, held, identity, write_story
from paragraph_ocr.stored import CONFIG, write_config
from paragraph_ocr.tracking import OUTBOX, PARENT_VARIABLE, TROUBLE, TrackedRun, database_uri

RELEASE = "release"
"""Folder of a run's release, in the run's own."""

FOLDER_VARIABLE = "PARAGRAPH_OCR_RUN_FOLDER"
"""Environment variable through which a run of several processes tells the others its folder."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has to show."""

    folder: Path
    metrics: dict[str, float]
    run_id: str | None
    fit_seconds: float
    """Spent on training, validation and test."""


def run(
    experiment: Experiment,
    *,
    overrides: Sequence[str],
    parent_folder: Path | None = None,
    stem: str | None = None,
    tags: Mapping[str, str] | None = None,
    watch: Watch | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train, test and report one experiment, or go on with one that did not come to its end.

    Model and optimizer are built before any data is touched, so that a mistake costs seconds.

    Args:
        overrides: what was typed; names the run, unless the experiment has a name.
        parent_folder: of the run's folder; None: `runs` in the outputs.
        stem: the folder's name; None: made of the time and the run's name.
        tags: further tags of the MLflow run.
        watch: may end training early as pruned; then there is no test.
        quiet: print nothing; somebody else shows what happens.

    Raises:
        UserError: a mistake that only building shows.
        Stopped: it ended before its aim, for a reason that a person can mend.
        KeyboardInterrupt, SystemExit: it was interrupted or terminated; MLflow says KILLED.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # of the processes that share this run
    console.console.quiet = quiet or not first
    quiet_lightning()
    before = None
    if experiment.resume is not None:
        before = find_unfinished(experiment.resume, composed=experiment, overrides=overrides)
        if before is None:
            console.say("resume=auto: no unfinished run of this experiment, so a new one begins.")
        experiment = before.experiment if before else experiment
        experiment.resume = None
    with held(before.folder) if before and first else nullcontext():
        checkpoint = (
            newest_checkpoint(before.folder, identity=identity(experiment)) if before else None
        )
        began = time.perf_counter()
        pl.seed_everything(experiment.seed, workers=True, verbose=False)
        name = (before and before.name) or experiment.name or run_name(overrides)
        try:
            vocabulary = build.build_vocabulary(experiment)
            recognizer = build_model.build_recognizer(
                experiment, vocabulary, initial_weights=checkpoint is None
            )
            learner = build.build_learner(experiment, recognizer, vocabulary)
        except Exception:
            # a person's mistake leaves nothing behind; a trial that cannot be built is a result
            refused = _track(experiment, None, name=name, tags=tags) if tags else None
            with refused.ending() if refused else nullcontext():
                raise
        timeline.mark("built")
        _announce(experiment, learner)
        if before:
            folder = before.folder
            step = checkpoint.name.removeprefix("step_").lstrip("0") if checkpoint else None
            console.say(
                f"{folder} goes on from " + (f"step {step or 0}." if step else "its beginning.")
            )
        elif first:
            parent = parent_folder or Path(experiment.outputs) / "runs"
            folder = make_folder(parent, stem or folder_name(name))
            os.environ[FOLDER_VARIABLE] = str(folder)
            write_config(experiment, folder)
        else:
            folder = Path(_folder_of_the_first())
        with held(folder) if first and not before else nullcontext():
            job = _Job(experiment, learner, folder=folder, name=name, watch=watch, began=began)
            return job.run(before=before, checkpoint=checkpoint, tags=tags or {}, first=first)


class _Job:
    """A run that has its folder: from the data to the report."""

    def __init__(
        self,
        experiment: Experiment,
        learner: Learner,
        *,
        folder: Path,
        name: str,
        watch: Watch | None,
        began: float,
    ) -> None:
        self.experiment, self.learner, self.folder = experiment, learner, folder
        self.name, self.watch, self.began = name, watch, began
        self.keep = KeepWeights(folder)
        self.tracked: TrackedRun | None = None
        trainer = experiment.trainer
        limits = trainer.checkpoint
        # a trial that is killed begins again, and a rehearsal leaves nothing
        self.keeps_checkpoints = experiment.trial is None and not trainer.fast_dev_run
        self.checkpoints = Checkpoints(
            folder,
            every_s=limits.every_s,
            every_n_steps=limits.every_n_steps,
            keep=limits.keep,
            limits=json.dumps([trainer.max_epochs, trainer.max_steps, trainer.max_time]),
            before=self._bring_to_safety,
        )

    def run(
        self,
        *,
        before: Unfinished | None,
        checkpoint: Path | None,
        tags: Mapping[str, str],
        first: bool,
    ) -> Outcome:
        """Go from data to report under the eyes of MLflow, and say how it ended."""
        if first:
            self.tracked = _track(
                self.experiment,
                self.folder,
                name=self.name,
                tags={"folder": str(self.folder), **tags},
                run_id=before.run_id if before else None,
            )
        tracked = self.tracked
        if first:
            self._tell(status="running")
        try:
            ending = tracked.ending() if tracked else nullcontext()
            with self._ending_in_order(), ending, ExitStack() as self.stack:
                try:
                    metrics, seconds = self._work(checkpoint)
                except Exception as error:
                    explained = explain_end(error, self.experiment, self.folder)
                    if explained is None:
                        raise
                    raise explained from error
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "interrupted" if interrupted else "failed"
            if first:
                self._tell(status=status, reason=f"{type(error).__name__}: {error}"[:500])
                if self.keeps_checkpoints:
                    console.say(f"Go on with: python train.py resume={self.folder}")
            raise
        if first:
            self._tell(status="finished", metrics=metrics)
        return Outcome(self.folder, metrics, tracked.run_id if tracked else None, seconds)

    def _tell(self, **story: Any) -> None:
        run_id = self.tracked.run_id if self.tracked else None
        with suppress(OSError):  # of a full disk, the reason is told already
            write_story(self.folder, name=self.name, mlflow_run_id=run_id, **story)

    def _bring_to_safety(self) -> None:
        if self.tracked:
            self.tracked.flush()

    def _work(self, checkpoint: Path | None) -> tuple[dict[str, float], float]:
        """Return the metrics, and the seconds spent on training, validation and test."""
        experiment, learner, tracked, watch = (
            self.experiment,
            self.learner,
            self.tracked,
            self.watch,
        )
        if tracked:
            tracked.log_file(self.folder / CONFIG)
        with console.progress("prepare") as progress:
            datamodule = build.build_datamodule(experiment, learner.vocabulary, progress=progress)
            datamodule.prepare_data()
        datamodule.setup("fit")
        timeline.mark("data")
        console.say(repr(datamodule))
        limits = experiment.trainer
        callbacks: list[pl.Callback] = [self.keep, Measure(), TrainingProgress()]
        if watch is not None:
            callbacks.append(watch)
        if isinstance(datamodule, CurriculumDataModule):
            callbacks.append(
                FollowCurriculum(datamodule.curriculum, datamodule.reached, datamodule.may_begin)
            )
        if timeline.asked():
            callbacks.append(MarkFirstStep())
        if limits.overfit_batches and limits.early_stopping.when_read:
            callbacks.append(StopWhenRead())
        files = CheckpointFiles(identity=identity(experiment), best=self.keep.best_path)
        if self.keeps_checkpoints:
            callbacks.append(self.checkpoints)
        match limits.on_nan:
            case "stop":
                callbacks.append(StopWhenDiverged())
            case "skip":
                learner.on_not_finite = SkipStep()
            case "rollback":
                learner.on_not_finite = RollBack(learner, self.folder, files)
        trainer = build.build_trainer(
            experiment,
            folder=self.folder,
            logger=tracked.logger() if tracked else None,
            callbacks=callbacks,
            plugins=[files],
        )
        if checkpoint is not None:
            restore_best(checkpoint, self.keep.best_path)
        self.stack.enter_context(_together(trainer, tracked))
        fit_began = time.perf_counter()
        trainer.fit(learner, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        metrics = self.checkpoints.metrics | _metrics(trainer)
        pruned = watch is not None and watch.pruned
        # max_steps or max_time may have ended it since the last validation
        unseen = self.keep.validated_step != trainer.global_step
        if unseen and limits.limit_val_batches and not pruned:
            trainer.validate(learner, datamodule=datamodule, verbose=False)
            metrics |= _metrics(trainer)
        trainer.strategy.barrier()  # until the first process has written the weights
        tests = bool(limits.limit_test_batches) and not trainer.fast_dev_run and not pruned
        if tests and self.keep.best_path.exists():
            build_model.load_weights(learner.kept, self.keep.best_path)
            if experiment.release:
                learner.kept.load_state_dict(restore(quantise(learner.kept.state_dict())))
            trainer.test(learner, datamodule=datamodule, verbose=False)
            metrics |= _metrics(trainer)
        fit_seconds = time.perf_counter() - fit_began
        metrics |= {"minutes": (time.perf_counter() - self.began) / 60, **_sizes(learner)}
        if tracked and watch is not None:
            tracked.tag("trial_state", "PRUNED" if pruned else "COMPLETE")
        _report(experiment, learner, metrics, folder=self.folder, name=self.name, tracked=tracked)
        if tracked and experiment.tracking.log_model and self.keep.best_path.exists():
            _log_model(experiment, tracked.run_id, folder=self.folder)
        if experiment.release and self.keep.best_path.exists() and trainer.is_global_zero:
            _release(self.folder, metrics, run=self.name)
        return metrics, fit_seconds

    @contextmanager
    def _ending_in_order(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C save the run and end it; a second one ends it at once."""

        def handle(number: signal.Signals) -> None:
            if self.checkpoints.asked is not None or not self.checkpoints.at_work:
                raise KeyboardInterrupt(number.name)
            self.checkpoints.asked = number.name
            console.warn(
                f"{number.name}: saving the run, then ending it. Once more ends it at once."
            )

        with signals.taken_by(handle) as take_back:
            # Lightning puts a handler of its own before ours, which would end the run without saving
            self.checkpoints.take_signals = take_back
            yield


def run_name(overrides: Sequence[str]) -> str:
    """Return a name made of the overrides, or "default"; folders take it as it is."""
    return ",".join(overrides) or "default"


def folder_name(name: str) -> str:
    """Return a folder's name made of the time and the run's name.

    It keeps to letters, digits, dots, dashes and underscores, so that a path can be typed as an
    override without quoting.
    """
    return time.strftime("%Y-%m-%d_%H-%M-%S_") + re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]


def make_folder(parent: Path, stem: str) -> Path:
    """Return a new folder that no other run has or gets."""
    for count in range(1, 10_000):
        folder = parent / (stem if count == 1 else f"{stem}_{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run of this very second
            continue
        return folder
    raise RuntimeError(f"{stem}: ten thousand runs in a second")


def _announce(experiment: Experiment, learner: Learner) -> None:
    """Say what is about to be trained, and what may surprise."""
    trainer = experiment.trainer
    sizes = _sizes(learner)
    console.say(
        f"model {sizes['parameters']:.2f} M parameters (encoder {sizes['encoder_parameters']:.2f} M,"
        f" {sizes['trained_parameters']:.2f} M trained); precision {build.precision(trainer)}"
    )
    if trainer.accelerator == "auto" and not torch.cuda.is_available():
        console.warn("No GPU here: training on the CPU in float32, which will be slow.")
    if build.differing_norms(experiment, learner.recognizer):
        console.warn(
            "BatchNorm learns from each process's own pages on CPUs, so figures differ from those of one "
            "process. Pass model.encoder.freeze=true to have them equal."
        )
    regularized = any(asdict(experiment.regularization.augmentation).values())
    if trainer.overfit_batches and (regularized or experiment.regularization.token_noise):
        console.say("Memorising: augmentation and token noise are off.")


def _sizes(learner: Learner) -> dict[str, float]:
    """Return numbers of parameters in millions."""
    recognizer = learner.recognizer
    counts = {
        "parameters": sum(p.numel() for p in recognizer.parameters()),
        "encoder_parameters": sum(p.numel() for p in recognizer.encoder.parameters()),
        "trained_parameters": sum(p.numel() for p in recognizer.parameters() if p.requires_grad),
    }
    return {name: count / 1e6 for name, count in counts.items()}


def _track(
    experiment: Experiment,
    folder: Path | None,
    *,
    name: str,
    tags: Mapping[str, str] | None,
    run_id: str | None = None,
) -> TrackedRun | None:
    tracking = experiment.tracking
    if tracking.name == "off" or experiment.trainer.fast_dev_run:
        return None
    return TrackedRun(
        Path(experiment.outputs),
        name=name,
        parameters=flatten(asdict(experiment)),
        tags=tags or {},
        run_id=run_id,
        outbox=folder / OUTBOX if folder else None,
        experiment_name=tracking.experiment_name,
        uri=tracking.uri,
        parent=os.environ.get(PARENT_VARIABLE),
        system_metrics=tracking.system_metrics,
    )


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted keys; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            leaves |= flatten(value, dotted)
        else:
            leaves[dotted] = value
    return leaves


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _report(
    experiment: Experiment,
    learner: Learner,
    metrics: dict[str, float],
    *,
    folder: Path,
    name: str,
    tracked: TrackedRun | None,
) -> None:
    """Leave figures, readings and images in MLflow, and show the panel."""
    pairs = [(sample.truth, sample.reading) for sample in learner.samples]
    if tracked:
        measured = {name: metrics[name] for name in ("minutes", *_sizes(learner))}
        tracked.log_metrics(measured, step=0)
        if pairs:
            tracked.log_readings(pairs, name="readings")
        tracked.log_images([sample.image.numpy() for sample in learner.samples], folder="samples")
    console.show_outcome(
        title=name,
        metrics=metrics,
        samples=pairs[:3],
        folder=folder,
        open_ui=_ui_command(experiment) if tracked else None,
    )


def _log_model(experiment: Experiment, run_id: str | None, *, folder: Path) -> None:
    """Keep the model in MLflow, and say how it is served; if MLflow is away, how it is logged later."""
    # importing what serves takes a second, and most runs do not ask for it
    from paragraph_ocr.mlflow_model import log_finished, serve_command
    from paragraph_ocr.reading.checkpoint import find_checkpoint

    register = experiment.tracking.register
    try:
        if run_id is None:
            raise OSError("it has not taken the run either")
        logged, uri = log_finished(
            find_checkpoint(folder),
            outputs=Path(experiment.outputs),
            register=register,
            run_id=run_id,
        )
    except TROUBLE as error:
        later = f"python scripts/export.py checkpoint={folder} to=mlflow"
        later += f" register={register}" if register else ""
        console.warn(f"MLflow did not take the model ({error}). Log it later with {later}")
        return
    console.say(f"serve it   {serve_command(logged, uri)}")


def _release(folder: Path, metrics: Mapping[str, float], *, run: str) -> None:
    """Leave what is passed on in the run's folder, and say how it is read with."""
    # what reads is not needed to train
    from paragraph_ocr.reading import Recognizer
    from paragraph_ocr.reading.release import release

    target = folder / RELEASE
    shutil.rmtree(target, ignore_errors=True)  # of a run that has gone further since
    release(Recognizer.load(folder, device="cpu"), target, metrics=metrics, run=run)
    console.say(f"read with it   python scripts/read.py checkpoint={target} image=<scan>")


def _ui_command(experiment: Experiment) -> str:
    """Return what opens MLflow on this run: the light settings of `nox -s ui` where they fit."""
    outputs = Path(experiment.outputs)
    uri = database_uri(outputs, experiment.tracking.uri)
    if uri != f"sqlite:///{outputs.resolve() / 'mlflow.db'}":
        return f"mlflow ui --backend-store-uri {uri}"
    return "nox -s ui" if experiment.outputs == "outputs" else f"nox -s ui -- {outputs}"


def _folder_of_the_first() -> str:
    """Return the run folder that the first process has told this one.

    Raises:
        UserError: something else than this program has started this process.
    """
    try:
        return os.environ[FOLDER_VARIABLE]
    except KeyError as error:
        raise UserError(
            "LOCAL_RANK is set, and train.py starts its processes by itself. Type `python train.py "
            "trainer=ddp` without torchrun."
        ) from error


def _together(trainer: pl.Trainer, tracked: TrackedRun | None) -> AbstractContextManager[None]:
    """Return a context in which this run's processes end together."""
    if not isinstance(trainer.strategy, Processes):
        return nullcontext()

    def give_up(line: str) -> None:
        """End this process from a thread: its main one waits for what will never come."""
        console.error(line)
        if tracked:
            tracked.tag("reason", line)
            tracked.end("FAILED")
        os._exit(1)

    return trainer.strategy.watched(give_up)


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements, and what it and torch say of what is meant or no matter."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*LeafSpec.*",
        ".*resuming from a checkpoint that ended before the epoch.*",  # the sampler goes on
        ".*GPU available but not used.*",
        ".*sync_dist=True.*",  # metrics sum over processes by themselves
        ".*broadcast_buffers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*module.s. in eval mode at the start of training.*",
        "Grad strides do not match bucket view strides.*",  # 1x1 filters, whose memory is the same
    ):
        warnings.filterwarnings("ignore", text)
