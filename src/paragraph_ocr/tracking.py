"""MLflow: a run opened once, told the truth about its end, with what a person compares in it."""

import fcntl
import functools
import json
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from paragraph_ocr.errors import UserError
from paragraph_ocr.metrics import character_error_rate

for _talkative in ("mlflow", "alembic"):
    logging.getLogger(_talkative).setLevel(logging.WARNING)

PARENT_VARIABLE = "PARAGRAPH_OCR_PARENT_RUN"
"""Environment variable through which a sweep tells its jobs the id of their parent run."""

SECONDS_BETWEEN_WRITES = 3.0

DEFAULT_EXPERIMENT = "paragraph_ocr"

DATABASE = "mlflow.db"

_MODEL_FILES = ("config.yaml", "best.safetensors")


def database_uri(outputs: Path, uri: str | None = None) -> str:
    """Return where runs are kept: `uri`, else MLFLOW_TRACKING_URI, else a SQLite file in outputs."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(outputs / DATABASE)


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path.resolve()}"


def open_experiment(
    outputs: Path, *, name: str, uri: str | None
) -> tuple[mlflow.MlflowClient, str]:
    """Return a client and the experiment's id; both are made if this is the first run.

    One process at a time: several that create a fresh SQLite file together crash.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    database = outputs / DATABASE
    with (outputs / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database_uri(outputs, uri) == _sqlite(database) and not database.exists():
            _make_database(database, artifacts=outputs / "artifacts")
        client = mlflow.MlflowClient(database_uri(outputs, uri))
        existing = client.get_experiment_by_name(name)
        if existing is not None:
            return client, existing.experiment_id
        try:
            # the default place is the working directory of whoever came first, fixed for ever
            location = (outputs / "artifacts").resolve().as_uri()
            return client, client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another machine was faster, or it was deleted in the UI
            existing = client.get_experiment_by_name(name)
            if existing is None:
                raise
            return client, existing.experiment_id


def folder_of_run(run_id: str, *, outputs: Path) -> Path:
    """Return the folder of a run; one whose folder is gone comes from its artifacts, if they hold it.

    Raises:
        UserError: there is no such run, or its weights lie nowhere.
    """
    uri = database_uri(outputs)
    if uri == _sqlite(outputs / DATABASE) and not (outputs / DATABASE).exists():
        raise UserError(
            f"checkpoint={run_id}: {outputs / DATABASE} does not exist. Pass a run folder, or set "
            "MLFLOW_TRACKING_URI to where the run is kept."
        )
    client = mlflow.MlflowClient(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"checkpoint={run_id} is no run of {uri}. Pass a run folder, or a run's id from the UI."
        ) from error
    folder = Path(run.data.tags.get("folder", ""))
    if "folder" in run.data.tags and all((folder / name).is_file() for name in _MODEL_FILES):
        return folder
    kept = {artifact.path for artifact in client.list_artifacts(run_id)}
    if not kept.issuperset(_MODEL_FILES):
        raise UserError(
            f"checkpoint={run_id}: its folder {folder} is gone or has no weights, and MLflow keeps no "
            "copy of them. Pass another run."
        )
    fetched = outputs / "fetched" / run_id
    fetched.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FILES:
        with tempfile.TemporaryDirectory(dir=fetched) as aside:  # whole before it has its name
            Path(client.download_artifacts(run_id, name, aside)).replace(fetched / name)
    return fetched


def run_of_folder(
    folder: Path, *, outputs: Path, experiment_name: str, uri: str | None
) -> str | None:
    """Return the id of the run that left this folder, if MLflow knows it."""
    if "'" in folder.name:  # no run's own folder, and MLflow's filters have no way to quote it
        return None
    client, experiment = open_experiment(outputs, name=experiment_name, uri=uri)
    for run in client.search_runs([experiment], f"tags.folder LIKE '%{folder.name}'"):
        if Path(run.data.tags["folder"]).resolve() == folder.resolve():
            return run.info.run_id
    return None


def _make_database(path: Path, *, artifacts: Path) -> None:
    """Make MLflow's tables in a file aside and rename it: a torn set of tables is never mended."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    store = SqlAlchemyStore(_sqlite(aside), artifacts.resolve().as_uri())
    store.engine.dispose()
    aside.replace(path)


class TrackedRun:
    """One run in MLflow; leave the context with the status that is true.

    Args:
        parameters: dotted keys and values, comparable across runs in the UI.
        parent: id of the sweep's run, or None.
    """

    def __init__(
        self,
        outputs: Path,
        *,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        experiment_name: str = DEFAULT_EXPERIMENT,
        uri: str | None = None,
        parent: str | None = None,
        system_metrics: bool = False,
    ) -> None:
        self.client, experiment = open_experiment(outputs, name=experiment_name, uri=uri)
        tags = {**_environment_tags(), **tags}
        if parent:
            tags[MLFLOW_PARENT_RUN_ID] = parent
        # named here: seeding everything would seed MLflow's random names too
        self.run_id = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
        self.uri = database_uri(outputs, uri)
        self._system_metrics = system_metrics
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        # MLflow cuts a value at 250 characters here and there; the whole config is an artifact
        listed = [Param(key, str(value)[:250]) for key, value in parameters.items()]
        for start in range(0, len(listed), 100):
            self.client.log_batch(self.run_id, params=listed[start : start + 100])

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Watch the system while the block runs; close the run as FINISHED, KILLED or FAILED."""
        monitor = None
        if self._system_metrics:
            monitor = SystemMetricsMonitor(self.run_id, sampling_interval=5, tracking_uri=self.uri)
            monitor.start()
        status = RunStatus.FAILED
        try:
            yield
            status = RunStatus.FINISHED
        except (KeyboardInterrupt, SystemExit):
            status = RunStatus.KILLED
            raise
        except Exception as error:
            self.tag("reason", f"{type(error).__name__}: {error}")
            raise
        finally:
            if monitor is not None:
                monitor.finish()
            self._flush()
            self.client.set_terminated(self.run_id, RunStatus.to_string(status))

    def logger(self) -> Logger:
        """Return Lightning's logger on this run."""
        return _MetricsLogger(self)

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.run_id, key, value[:5000])

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log, a few seconds' metrics at a time: the database takes milliseconds for each call."""
        now = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_WRITES:
            self._flush()

    def _flush(self) -> None:
        for start in range(0, len(self._buffer), 1000):  # MLflow takes no more at once
            self.client.log_batch(self.run_id, metrics=self._buffer[start : start + 1000])
        self._buffer.clear()
        self._flushed = time.monotonic()

    def log_images(self, images: Sequence[np.ndarray], *, folder: str) -> None:
        """Log pages ("H W", 0 is paper) as dark ink on white."""
        for index, image in enumerate(images):
            page = (255 - image)[:, :, None].repeat(3, axis=2)
            self.client.log_image(self.run_id, page, f"{folder}/{index:03d}.png")

    def log_readings(self, pairs: Sequence[tuple[str, str]], *, name: str) -> None:
        """Log (truth, reading) pairs as a table; one name in every run lets the UI compare them."""
        table = {
            "truth": [truth for truth, _ in pairs],
            "reading": [reading for _, reading in pairs],
            "cer": [round(character_error_rate([r], [t]), 4) for t, r in pairs],
        }
        self.client.log_table(self.run_id, table, f"{name}.json")


class SharedRun:
    """A parent run that several processes, side by side or one after another, write to.

    The first to come makes it; it is found again by its tags.
    """

    def __init__(
        self,
        outputs: Path,
        *,
        name: str,
        tags: Mapping[str, str],
        experiment_name: str = DEFAULT_EXPERIMENT,
        uri: str | None = None,
    ) -> None:
        self.client, self._experiment = open_experiment(outputs, name=experiment_name, uri=uri)
        self._filter = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._find()
        if not found:
            all_tags = {**_environment_tags(), **tags}
            self.client.create_run(self._experiment, run_name=name, tags=all_tags)
            found = self._find()
            for surplus in found[1:]:  # another process came at the same moment
                self.client.delete_run(surplus)
        self.run_id = found[0]

    def _find(self) -> list[str]:
        """Return the ids of the runs with these tags, in an order that all processes see."""
        runs = self.client.search_runs([self._experiment], self._filter)
        return [
            run.info.run_id
            for run in sorted(runs, key=lambda r: (r.info.start_time, r.info.run_id))
        ]

    @contextmanager
    def ending(self, *, others: Callable[[], bool]) -> Iterator[None]:
        """Say RUNNING while the block runs and how it ended after it, unless `others` still work."""
        self.client.update_run(self.run_id, status="RUNNING")
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except Exception as error:
            self.tag("reason", f"{type(error).__name__}: {error}")
            raise
        finally:
            if not others():
                self.client.set_terminated(self.run_id, status)

    def running_children(self) -> list[tuple[str, dict[str, str]]]:
        """Return id and tags of the runs below this one that are said to be running."""
        children = self.client.search_runs(
            [self._experiment],
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and attributes.status = 'RUNNING'",
        )
        return [(run.info.run_id, dict(run.data.tags)) for run in children]

    def kill(self, run_id: str, *, reason: str) -> None:
        self.client.set_tag(run_id, "reason", reason)
        self.client.set_terminated(run_id, "KILLED")

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.run_id, key, value[:5000])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        now = int(time.time() * 1000)
        listed = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=listed)

    def log_text(self, text: str, path: str) -> None:
        self.client.log_text(self.run_id, text, path)

    def log_json(self, tree: Mapping[str, Any], path: str) -> None:
        self.client.log_dict(self.run_id, dict(tree), path)

    def log_figure(self, figure: Any, path: str) -> None:
        """Log a matplotlib figure as an image."""
        self.client.log_figure(self.run_id, figure, path)


class _MetricsLogger(Logger):
    """Lightning's metrics to a run; parameters and the end of the run are TrackedRun's.

    Lightning's own MLFlowLogger would end the run itself, and sets MLflow's address for the whole
    process and its children.
    """

    def __init__(self, run: TrackedRun) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        return "mlflow"

    @property
    def version(self) -> str:
        return self._run.run_id

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Parameters were logged when the run was opened."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._run.log_metrics(metrics, step=step or 0)


@functools.cache
def _environment_tags() -> Mapping[str, str]:
    """Return git commit (with a mark if the tree is changed) and host, as far as they are known."""
    tags = {"host": platform.node()}
    source = Path(__file__).parent
    try:
        git = ["git", "-C", str(source)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:  # no git here
        return tags
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.changed"] = json.dumps(bool(changed.stdout.strip()))
    return tags
