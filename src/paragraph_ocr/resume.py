"""Runs that go on: which folder, under which config, and who may write there.

RUN/run.json   name, MLflow run, status: "running", "interrupted", "failed" or "finished"
RUN/run.lock   held while a process works on the run
"""

import copy
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paragraph_ocr.checks import check_combinations
from paragraph_ocr.config import Experiment
from paragraph_ocr.errors import UserError, nearest
from paragraph_ocr.stored import CONFIG, read_config

CHANGEABLE = (
    "datamodule.num_workers",
    "datamodule.placement",
    "datamodule.root",
    "tracking.system_metrics",
    "tracking.uri",
    "trainer.accelerator",
    "trainer.checkpoint.every_n_steps",
    "trainer.checkpoint.every_s",
    "trainer.checkpoint.keep",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.devices",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.on_nan",
    "trainer.profiler",
    "trainer.strategy",
)
"""Keys that may be given anew when a run goes on: how long, on what, and how it is watched."""

_BESIDE = ("name", "outputs", "resume", "release", "trial", "tracking", "model.weights")
"""Further keys that do not say what is being trained."""

AUTO = "auto"
_STORY, _LOCK = "run.json", "run.lock"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that goes on in its folder."""

    folder: Path
    experiment: Experiment
    name: str | None
    run_id: str | None


def identity(experiment: Experiment) -> str:
    """Return a hash of all that a checkpoint depends on."""
    tree = asdict(experiment)
    for key in (*CHANGEABLE, *_BESIDE):
        node, *path = tree, *key.split(".")
        for part in path[:-1]:
            node = node[part]
        node.pop(path[-1], None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def find_unfinished(
    asked: str, *, composed: Experiment, overrides: Sequence[str]
) -> Unfinished | None:
    """Return the run that `resume=` means; None: with "auto", there is none to go on with.

    Args:
        composed: what the command line alone would train.
        overrides: what was typed; for a run folder, only those of CHANGEABLE may be.

    Raises:
        UserError: no such run, one that cannot go on, or an override that would change it.
    """
    if asked == AUTO:
        return _newest(composed)
    folder = Path(asked)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"resume={asked} is no run folder: it has no {CONFIG}. Pass one of outputs/runs, or auto."
        )
    experiment = read_config(folder)
    if experiment.trial is not None:
        raise UserError(
            f"resume={asked} is a trial, which its search begins again. Type the search's command."
        )
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key == "resume":
            continue
        if key not in CHANGEABLE:
            close = nearest(key, CHANGEABLE, count=1)
            raise UserError(
                f"{override} would change a run that goes on"
                + (f" (nearest that may: {close[0]})" if close else "")
                + ". Leave it out, or start a new run with model.weights=<run folder>."
            )
        _set(experiment, key, _get(composed, key))
    return _unfinished(folder, experiment)


def _newest(composed: Experiment) -> Unfinished | None:
    """Return the newest run that was neither finished nor is being worked on, of the same experiment."""
    wanted = identity(composed)
    configs = Path(composed.outputs).glob(f"runs/*/{CONFIG}")
    for config in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            same = identity(read_config(config)) == wanted
        except UserError:
            continue
        story = read_story(config.parent)
        if same and story.get("status") != "finished" and not _is_held(config.parent):
            return _unfinished(config.parent, copy.deepcopy(composed))
    return None


def _unfinished(folder: Path, experiment: Experiment) -> Unfinished:
    story = read_story(folder)
    if folder.resolve().parent.name == "runs":  # wherever the command is typed
        experiment.outputs = str(folder.resolve().parent.parent)
    experiment.resume = None
    checked = copy.deepcopy(experiment)
    checked.model.weights = None  # a checkpoint goes on without what the run began from
    check_combinations(checked)
    name, run_id = story.get("name"), story.get("mlflow_run_id")
    return Unfinished(
        folder,
        experiment,
        name if isinstance(name, str) else None,
        run_id if isinstance(run_id, str) else None,
    )


def _get(experiment: Experiment, key: str) -> Any:
    value: Any = experiment
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _set(experiment: Experiment, key: str, value: Any) -> None:
    path, _, last = key.rpartition(".")
    setattr(_get(experiment, path), last, value)


def read_story(folder: Path) -> dict[str, Any]:
    """Return what a run last said of itself; nothing where that cannot be read."""
    try:
        story = json.loads((folder / _STORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return story if isinstance(story, dict) else {}


def write_story(folder: Path, **story: Any) -> None:
    """Add to what a run says of itself."""
    aside = folder / f".{_STORY}.part"
    aside.write_text(json.dumps(read_story(folder) | story, indent=1), encoding="utf-8")
    aside.replace(folder / _STORY)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes away from a run while the block runs.

    Raises:
        UserError: another process works on it.
    """
    try:
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to: {error.strerror}. Give it back its rights, or copy it to "
            "where you may write."
        ) from error
    with lock:
        try:
            # this lock dies with the process; one by flock() would live on in its loader's workers
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"resume={folder}: another process is working on this run. Wait for it, or stop it first."
            ) from error
        yield


def _is_held(folder: Path) -> bool:
    try:
        with held(folder):
            return False
    except UserError:
        return True
