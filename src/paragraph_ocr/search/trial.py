"""The job's side of a search: one trial, watched while it trains."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from paragraph_ocr.config import Experiment, StudyConfig
from paragraph_ocr.learning.callbacks import Watch
from paragraph_ocr.run import run
from paragraph_ocr.search.study import open_storage, storage_url, study_folder
from paragraph_ocr.targets import check_targets


def run_trial(experiment: Experiment, sweeper: Any) -> dict[str, Any]:
    """Return what a trial has to show, in plain values, for it may have to travel.

    Args:
        sweeper: Hydra's node of that name, for the study's name, storage and pruner.

    Raises:
        UserError: a mistake that only building shows; the study records it as a failure.
    """
    assert experiment.trial is not None
    options = OmegaConf.to_object(sweeper)
    assert isinstance(options, StudyConfig)
    outputs, number = Path(experiment.outputs), experiment.trial
    judge = None
    if options.report.metric is not None:
        check_targets(options.pruner, "hydra.sweeper.pruner")
        url = storage_url(outputs, options.study_name, options.storage)
        judge = _judge(url, options.study_name, number, options.pruner)
    _set_aside_what_stays()
    watch = Watch(options.report.metric, every=options.report.every, judge=judge)
    try:
        outcome = run(
            experiment,
            overrides=[],
            parent_folder=study_folder(outputs, options.study_name),
            stem=f"{number:04d}",
            tags={"study": options.study_name, "trial": str(number)},
            watch=watch,
            quiet=True,
        )
    finally:
        pruned = watch.pruned
        del watch  # Lightning has given it the learner's methods
        gc.collect()  # Lightning's objects hold each other, and through them the model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "metrics": outcome.metrics,
        "folder": str(outcome.folder),
        "fit_seconds": outcome.fit_seconds,
        "memory_mib": _memory_mib(),
        "pruned": pruned,
    }


@functools.cache
def _set_aside_what_stays() -> None:
    """Spare each trial's collection the million objects of the imported libraries.

    Once a process: a config that was just composed is a ring of garbage, and would be set aside too.
    """
    gc.collect()
    gc.freeze()


def _memory_mib() -> dict[str, float]:
    """Return what this process holds after a trial, of the host's memory and of the GPU's."""
    held = {"host": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_available():
        held["gpu"] = torch.cuda.memory_reserved() / 2**20
    return held


def _judge(
    url: str, name: str, number: int, pruner_config: dict[str, Any]
) -> Callable[[int, float], bool]:
    """Return what reports a value at a step to the study, and returns whether to stop there."""
    storage = open_storage(url)
    pruner = instantiate(pruner_config)
    study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)

    def judge(step: int, value: float) -> bool:
        storage.set_trial_intermediate_value(trial_id, step, value)
        return bool(pruner.prune(study, storage.get_trial(trial_id)))

    return judge
