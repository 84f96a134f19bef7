"""A run's model in MLflow: saved as a pyfunc without a pickle, logged to its run, registered on request."""

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow.pyfunc
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from paragraph_ocr.config import Experiment
from paragraph_ocr.reading.checkpoint import BEST, Checkpoint
from paragraph_ocr.reading.examples import draw_examples
from paragraph_ocr.stored import CONFIG, read_config
from paragraph_ocr.tracking import TrackedRun, database_uri, open_experiment, run_of_folder

NAME = "model"

_PACKAGE = Path(__file__).parent
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "text"),
            ColSpec(DataType.double, "confidence"),
            ColSpec(Array(DataType.double), "confidences"),
        ]
    ),
)
_NEEDED = (
    *("torch", "timm", "safetensors", "numpy", "numba", "pillow", "opencv-python-headless"),
    *("omegaconf", "pyyaml", "jaxtyping", "mlflow-skinny", "pandas", "rapidfuzz", "pyspellchecker"),
)
"""Packages that the served code imports."""


@dataclass(frozen=True, slots=True)
class Logged:
    """A model that MLflow has."""

    uri: str
    """What `mlflow models serve -m` takes."""
    version: str | None
    """In the registry; None if it was not registered."""


def save_model(
    folder: Path,
    *,
    config: Path,
    weights: Path,
    run_id: str | None = None,
    model_id: str | None = None,
) -> None:
    """Write a pyfunc into a new folder: config, weights, the package's code, signature, an example.

    Serving executes the code that stands there, so a model outlives changes of the package.
    """
    with tempfile.TemporaryDirectory() as aside:
        # under the names that belong together; of links MLflow takes none
        beside = shutil.copyfile(config, Path(aside) / CONFIG)
        named = shutil.copyfile(weights, Path(aside) / BEST)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(_PACKAGE / "reading" / "served.py"),
            artifacts={"config": str(beside), "weights": str(named)},
            signature=_SIGNATURE,
            input_example=_example(read_config(config)),
            code_paths=[str(_PACKAGE)],
            pip_requirements=[f"{name}=={version(name)}" for name in _NEEDED],
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
        )


def log_model(
    client: MlflowClient, run_id: str, *, config: Path, weights: Path, register: str | None = None
) -> Logged:
    """Log the model as an output of a run; make it the newest version of `register`, if given.

    The client's own calls, for MLflow's one-line way sets its address for the whole process.
    """
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=NAME, source_run_id=run_id)
    with _ready_at_the_end(client, logged.model_id), tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / NAME
        save_model(folder, config=config, weights=weights, run_id=run_id, model_id=logged.model_id)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    uri = f"models:/{logged.model_id}"
    if register is None:
        return Logged(uri, None)
    try:
        client.create_registered_model(register)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with _address(client.tracking_uri):
        made = client.create_model_version(register, uri, run_id, model_id=logged.model_id)
    return Logged(f"models:/{register}/{made.version}", str(made.version))


def log_finished(
    checkpoint: Checkpoint, *, outputs: Path, register: str | None, run_id: str | None = None
) -> tuple[Logged, str]:
    """Log the model of a finished run to it, or to a run of its own if MLflow knows of none.

    Args:
        run_id: of the run; None looks for the one that left the folder.

    Returns:
        the model, and the address of MLflow's database.
    """
    folder, tracking = checkpoint.config.parent, read_config(checkpoint.config).tracking
    place: dict[str, Any] = {"experiment_name": tracking.experiment_name, "uri": tracking.uri}
    run_id = run_id or run_of_folder(folder, outputs=outputs, **place)
    client, _ = open_experiment(outputs, name=tracking.experiment_name, uri=tracking.uri)
    if run_id is None:
        tags = {"kind": "model", "folder": str(folder)}
        made = TrackedRun(outputs, name=folder.name, parameters={}, tags=tags, **place)
        with made.ending():
            made.log_file(checkpoint.config)
        run_id = made.run_id
        assert run_id is not None  # without an outbox MLflow has taken it, or raised
    files = {"config": checkpoint.config, "weights": checkpoint.weights}
    logged = log_model(client, run_id, register=register, **files)
    return logged, database_uri(outputs, tracking.uri)


def serve_command(logged: Logged, uri: str) -> str:
    """Return what a person types to serve the model, in this environment and on this machine alone."""
    return (
        f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m {logged.uri} "
        "--env-manager local --port 5001"
    )


@contextmanager
def _address(uri: str) -> Iterator[None]:
    """Let MLflow look models up here: asked for one, its registry forgets the address of its client."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def _ready_at_the_end(client: MlflowClient, model_id: str) -> Iterator[None]:
    """Say of the model that it is ready, or that it failed."""
    status = LoggedModelStatus.FAILED
    try:
        yield
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(model_id, status)


def _example(experiment: Experiment) -> pd.DataFrame | None:
    pages = draw_examples(experiment, 1)
    if not pages:
        return None
    return pd.DataFrame({"image": [base64.b64encode(page.png()).decode() for page in pages]})
