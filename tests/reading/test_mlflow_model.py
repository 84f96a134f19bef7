"""A run's model in MLflow: what is kept, and that what is served reads as what is here."""

import base64
import io
import json
import os
import pickletools
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
import yaml
from pages import scans
from PIL import Image

from paragraph_ocr.reading.checkpoint import find_checkpoint

SECONDS_TO_START = 120  # 5 s on an idle machine


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def client(outputs, run_folder):
    """Return a client of the database in which the model of the run folder is registered as "notes"."""
    from paragraph_ocr.mlflow_model import log_finished

    before = dict(os.environ)
    logged, uri = log_finished(find_checkpoint(run_folder), outputs=outputs, register="notes")
    assert logged.uri == "models:/notes/1"
    assert dict(os.environ) == before
    return mlflow.MlflowClient(uri)


@pytest.fixture(scope="module")
def kept(client):
    """Return the folder of the registered model."""
    (version,) = client.search_model_versions("name = 'notes'")
    return Path(
        client.get_model_version_download_uri("notes", version.version).removeprefix("file://")
    )


def test_a_run_logs_its_model_as_its_output_and_registers_it(run_experiment):
    typed = ["tracking.log_model=true", "tracking.register=drafts"]
    outcome = run_experiment("model=tiny", "debug=ci", *typed)
    client = mlflow.MlflowClient(f"sqlite:///{outcome.folder.parents[1] / 'mlflow.db'}")
    run = client.get_run(outcome.run_id)
    (output,) = run.outputs.model_outputs
    (version,) = client.search_model_versions("name = 'drafts'")
    assert (version.version, version.run_id) == (1, outcome.run_id)
    assert version.source == f"models:/{output.model_id}"
    assert client.get_logged_model(output.model_id).status == "READY"
    assert run.info.status == "FINISHED"


def test_the_model_of_a_folder_that_mlflow_does_not_know_gets_a_run(client, run_folder):
    (version,) = client.search_model_versions("name = 'notes'")
    run = client.get_run(version.run_id)
    assert run.data.tags["folder"] == str(run_folder)
    assert [artifact.path for artifact in client.list_artifacts(version.run_id)] == ["config.yaml"]


def test_the_model_is_data_and_code_and_nothing_pickled(kept, run_folder):
    described = yaml.safe_load((kept / "MLmodel").read_text())
    columns = {side: json.loads(described["signature"][side]) for side in ("inputs", "outputs")}
    assert [column["name"] for column in columns["inputs"]] == ["image"]
    assert [column["name"] for column in columns["outputs"]] == [
        "text",
        "confidence",
        "confidences",
    ]
    (example,) = json.loads((kept / "input_example.json").read_text())["data"]
    with Image.open(io.BytesIO(base64.b64decode(example[0]))) as page:
        assert page.size == (160, 64)
    weights = (run_folder / "best.safetensors").read_bytes()
    assert (kept / "artifacts" / "best.safetensors").read_bytes() == weights
    for path in kept.rglob("*"):
        if path.is_file():
            assert not is_pickle(path.read_bytes()), path


def is_pickle(content: bytes) -> bool:
    """Return whether the bytes are a whole pickle of a protocol that holds objects."""
    try:
        return content[:1] == b"\x80" and bool(list(pickletools.genops(content)))
    except ValueError:
        return False


@pytest.mark.skipif(
    find_spec("flask") is None, reason="mlflow models serve needs pip install -e .[ui]"
)
def test_the_served_model_reads_as_the_local_one(recognizer, client, images, tmp_path):
    pages = scans(images)[:6]
    sent = [base64.b64encode(page.read_bytes()).decode() for page in pages]
    own = [recognizer.read(page) for page in pages]
    assert len({transcript.text for transcript in own} - {""}) > 1
    with serving("models:/notes/1", client.tracking_uri, tmp_path) as address:
        body = {"dataframe_records": [{"image": text} for text in sent]}
        status, answer = post(f"{address}/invocations", body)
        assert status == 200
        for found, transcript in zip(answer["predictions"], own, strict=True):
            assert found["text"] == transcript.text
            assert found["confidence"] == pytest.approx(transcript.confidence, abs=1e-3)
            assert len(found["confidences"]) == len(transcript.text)
        url = f"data:image/png;base64,{sent[0]}"
        _, answer = post(f"{address}/invocations", {"dataframe_records": [{"image": url}]})
        assert answer["predictions"][0]["text"] == own[0].text
        for wrong, said in (("%%%", "not base64"), ("aGVsbG8=", "no PNG, JPEG")):
            status, answer = post(
                f"{address}/invocations", {"dataframe_records": [{"image": wrong}]}
            )
            assert status == 400
            assert said in answer["message"]


@contextmanager
def serving(model: str, uri: str, folder: Path):
    """Serve a model as the documentation says while the block runs; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model]
    variables = {**os.environ, "MLFLOW_TRACKING_URI": uri, "CUDA_VISIBLE_DEVICES": ""}
    # as in an activated environment: it calls uvicorn by name
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    variables.pop("PYTHONPATH", None)  # the code that was kept with the model is what runs
    log = folder / "server.log"
    with (
        log.open("w") as written,
        subprocess.Popen(
            [*command, "--env-manager", "local", "--port", str(port)],
            cwd=folder,
            env=variables,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as server,
    ):
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not answers(f"http://127.0.0.1:{port}/ping"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 15)  # the command starts a server of its own


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def post(url: str, body: dict) -> tuple[int, dict]:
    """Return the status and the JSON of an answer."""
    content = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), content)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
