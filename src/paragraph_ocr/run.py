"""One run from start to finish: build, fit, test, report."""

import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from paragraph_ocr import build, build_model, console
from paragraph_ocr.config import Experiment
from paragraph_ocr.learning.callbacks import (
    KeepWeights,
    Measure,
    StopWhenRead,
    TrainingProgress,
    Watch,
)
from paragraph_ocr.learning.learner import Learner
from paragraph_ocr.stored import CONFIG, write_config
from paragraph_ocr.tracking import PARENT_VARIABLE, TrackedRun, database_uri

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
    """Train, test and report one experiment.

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
        KeyboardInterrupt, SystemExit: it was interrupted or terminated; MLflow says KILLED.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # of the processes that share this run
    console.console.quiet = quiet or not first
    _quiet_lightning()
    began = time.perf_counter()
    pl.seed_everything(experiment.seed, workers=True, verbose=False)
    outputs = Path(experiment.outputs)
    name = experiment.name or run_name(overrides)
    try:
        vocabulary = build.build_vocabulary(experiment)
        recognizer = build_model.build_recognizer(experiment, vocabulary)
        learner = build.build_learner(experiment, recognizer, vocabulary)
    except Exception:
        # a person's mistake leaves nothing behind; a trial that cannot be built is a result
        refused = _track(experiment, outputs, name=name, tags=tags) if tags else None
        with refused.ending() if refused else nullcontext():
            raise
    _announce(experiment, learner)

    if first:
        folder = make_folder(parent_folder or outputs / "runs", stem or folder_name(name))
        os.environ[FOLDER_VARIABLE] = str(folder)
        write_config(experiment, folder)
        tracked = _track(
            experiment, outputs, name=name, tags={"folder": str(folder), **(tags or {})}
        )
    else:
        folder, tracked = Path(os.environ[FOLDER_VARIABLE]), None
    with _termination_as_interrupt(), tracked.ending() if tracked else nullcontext():
        if tracked:
            tracked.log_file(folder / CONFIG)
        with console.progress("prepare") as progress:
            datamodule = build.build_datamodule(experiment, vocabulary, progress=progress)
            datamodule.prepare_data()
        datamodule.setup("fit")
        console.say(repr(datamodule))
        keep = KeepWeights(folder)
        callbacks: list[pl.Callback] = [keep, Measure(), TrainingProgress()]
        if watch is not None:
            callbacks.append(watch)
        if experiment.trainer.overfit_batches and experiment.trainer.early_stopping.when_read:
            callbacks.append(StopWhenRead())
        logger = tracked.logger() if tracked else None
        trainer = build.build_trainer(experiment, folder=folder, logger=logger, callbacks=callbacks)
        fit_began = time.perf_counter()
        trainer.fit(learner, datamodule=datamodule)
        metrics = _metrics(trainer)
        limits = experiment.trainer
        pruned = watch is not None and watch.pruned
        # max_steps or max_time may have ended it inside the first epoch
        if "val/cer" not in metrics and limits.limit_val_batches and not pruned:
            trainer.validate(learner, datamodule=datamodule, verbose=False)
            metrics |= _metrics(trainer)
        trainer.strategy.barrier()  # until the first process has written the weights
        tests = bool(limits.limit_test_batches) and not trainer.fast_dev_run and not pruned
        if tests and keep.best_path.exists():
            build_model.load_weights(recognizer, keep.best_path)
            trainer.test(learner, datamodule=datamodule, verbose=False)
            metrics |= _metrics(trainer)
        fit_seconds = time.perf_counter() - fit_began
        metrics |= {"minutes": (time.perf_counter() - began) / 60, **_sizes(learner)}
        if tracked and watch is not None:
            tracked.tag("trial_state", "PRUNED" if pruned else "COMPLETE")
        _report(experiment, learner, metrics, folder=folder, name=name, tracked=tracked)
        if tracked and experiment.tracking.log_model and keep.best_path.exists():
            _log_model(experiment, tracked, config=folder / CONFIG, weights=keep.best_path)
    return Outcome(folder, metrics, tracked.run_id if tracked else None, fit_seconds)


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
    experiment: Experiment, outputs: Path, *, name: str, tags: Mapping[str, str]
) -> TrackedRun | None:
    tracking = experiment.tracking
    if tracking.name == "off" or experiment.trainer.fast_dev_run:
        return None
    return TrackedRun(
        outputs,
        name=name,
        parameters=flatten(asdict(experiment)),
        tags=tags,
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


def _log_model(experiment: Experiment, tracked: TrackedRun, *, config: Path, weights: Path) -> None:
    """Keep the model in MLflow, and say how it is served."""
    # importing what serves takes a second, and most runs do not ask for it
    from paragraph_ocr.mlflow_model import log_model, serve_command

    register = experiment.tracking.register
    logged = log_model(
        tracked.client, tracked.run_id, config=config, weights=weights, register=register
    )
    console.say(f"serve it   {serve_command(logged, tracked.uri)}")


def _ui_command(experiment: Experiment) -> str:
    """Return what opens MLflow on this run: the light settings of `nox -s ui` where they fit."""
    outputs = Path(experiment.outputs)
    uri = database_uri(outputs, experiment.tracking.uri)
    if uri != f"sqlite:///{outputs.resolve() / 'mlflow.db'}":
        return f"mlflow ui --backend-store-uri {uri}"
    return "nox -s ui" if experiment.outputs == "outputs" else f"nox -s ui -- {outputs}"


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that its status is told."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet_lightning() -> None:
    """Leave out Lightning's advertisements and what it says of settings that are meant."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*LeafSpec.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*module.s. in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", text)
