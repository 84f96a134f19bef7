"""The README's first command, with its result looked up where a person would look."""

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 180
"""From typing the command to its end, on two cores without a GPU."""


def readme_command() -> list[str]:
    """Return the training command of the README as words, python being this one."""
    found = re.search(r"&& (python train\.py .*)", (ROOT / "README.md").read_text())
    assert found is not None
    return [sys.executable, *shlex.split(found[1])[1:]]


@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_the_first_command_of_the_readme_reads_its_batch_and_says_so(tmp_path, record_property):
    command = [*readme_command(), f"outputs={tmp_path}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    seconds = time.perf_counter() - began

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs").fetchall()
        latest = dict(database.execute("select key, value from latest_metrics"))
    ((run_id, status),) = runs
    assert status == "FINISHED"
    assert latest["val/cer"] <= 0.01
    assert latest["test/cer"] <= 0.01
    assert {"train/loss", "val/loss", "val/wer"} <= set(latest)
    artifacts = tmp_path / "artifacts" / run_id / "artifacts"
    assert (artifacts / "config.yaml").exists()
    assert len(list((artifacts / "samples").glob("*.png"))) == 16
    table = json.loads((artifacts / "readings.json").read_text())
    truths = [row[table["columns"].index("truth")] for row in table["data"]]
    assert len(set(truths)) == 16
    assert 130 <= sum(map(len, truths)) / 16 <= 170
    record_property("seconds", round(seconds))
    assert seconds <= SECONDS, f"{seconds:.0f} s from the command to its end, rendering included"

    (store,) = (tmp_path / "data").glob("*.h5")
    before = store.stat()
    subprocess.run([*command, "debug=quick"], cwd=ROOT, env=environment, check=True)
    assert (store.stat().st_ino, store.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    check_that_images_alone_decide_the_reading(tmp_path)


def check_that_images_alone_decide_the_reading(outputs: Path) -> None:
    """Exchanged pages must exchange the readings, and a blank page must not give any of them."""
    import torch

    from paragraph_ocr import build, build_model
    from paragraph_ocr.validation import compose, validate

    folder = min((outputs / "runs").iterdir())  # the first run, by time
    overrides = [*readme_command()[2:], f"outputs={outputs}", f"model.weights={folder}"]
    experiment = validate(compose(overrides))
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary).eval()
    datamodule = build.build_pages(experiment, vocabulary)
    datamodule.setup()
    batch = next(iter(datamodule.val_dataloader()))

    def read(images: torch.Tensor) -> list[str]:
        readings = recognizer.read(
            images, decoding=build_model.build_decoding(experiment, vocabulary), max_length=256
        )
        return [vocabulary.decode(reading.tokens) for reading in readings]

    readings = read(batch.images)
    truths = [vocabulary.decode(row) for row in batch.tokens[:, 1:].tolist()]
    assert sum(a == b for a, b in zip(readings, truths, strict=True)) >= 14
    assert read(batch.images.roll(1, dims=0)) == [readings[-1], *readings[:-1]]
    assert read(torch.zeros_like(batch.images[:1]))[0] not in readings
