"""Several processes learn what one would, score each paragraph once, and end together."""

import os
import signal
import sqlite3
import subprocess
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment

from commands import start_command
from paragraph_ocr import build, build_model
from paragraph_ocr.learning import processes
from paragraph_ocr.learning.processes import norms_that_differ, synchronise_batch_norms
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.validation import compose, validate

# BatchNorm is frozen, for on CPUs each process has its own; shares are uneven in training,
# validation and test, and two batches make a step
LEARNING = (
    "model=tiny",
    "model.encoder.freeze=true",
    "regularization=none",
    "debug=ci",
    "datamodule.num_train=15",
    "datamodule.num_val=5",
    "datamodule.num_test=3",
    "trainer.accumulate_grad_batches=2",
    "trainer.max_steps=20",
    "trainer.max_epochs=10",
    "trainer.check_val_every_n_epoch=5",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "optimizer.lr=1e-2",
)
TOGETHER = ("trainer=ddp", "trainer.devices=2")


def start(folder: Path, *overrides: str) -> BaseProcess:
    """Start a training whose processes write to two files in a folder."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    streams = [folder / "stdout", folder / "stderr"]
    return start_command("train.py", *overrides, env=variables, streams=streams)


def rows(outputs: Path, query: str) -> list[tuple]:
    with sqlite3.connect(outputs / "mlflow.db") as database:
        return database.execute(query).fetchall()


def curves(outputs: Path) -> dict[tuple[str, int], float]:
    found = rows(outputs, "select key, step, value from metrics where key like '%/%'")
    return {(key, step): value for key, step, value in found if not key.startswith("system/")}


def test_two_processes_learn_and_score_as_one_and_are_one_run(tmp_path, run_experiment):
    outputs = tmp_path / "together"
    typed = [*TOGETHER, *LEARNING, "datamodule.batch_size=2", f"outputs={outputs}"]
    together = start(tmp_path, *typed)
    run_experiment(*LEARNING, "datamodule.batch_size=4")
    together.join(timeout=200)
    assert together.exitcode == 0, (tmp_path / "stderr").read_text()
    one, two = curves(tmp_path), curves(outputs)
    assert one.keys() == two.keys()
    losses = {key for key in one if key[0] == "train/loss"}
    assert len(losses) == 20
    for key, value in one.items():
        tolerance = 1e-4 if key[0].endswith("loss") else 0
        assert two[key] == pytest.approx(value, rel=tolerance, abs=0), key
    rates = [value for (name, _), value in one.items() if name == "val/cer"]
    assert len(set(rates)) == 2 and 1 not in rates, "a model that writes nothing proves nothing"
    assert rows(outputs, "select status from runs") == [("FINISHED",)]
    (folder,) = (outputs / "runs").iterdir()
    assert {file.name for file in folder.iterdir()} >= {"config.yaml", "best.safetensors"}
    assert (tmp_path / "stdout").read_text().count("run folder") == 1


@pytest.mark.parametrize("victim", [pytest.param("first", marks=pytest.mark.slow), "second"])
def test_a_process_that_is_killed_takes_the_other_along(victim, tmp_path):
    endless = ("trainer.max_steps=1000000", "trainer.max_epochs=1000000", "datamodule=fake")
    first = start(tmp_path, "model=tiny", "debug=ci", *endless, *TOGETHER, "trainer.accelerator=cpu",
                  "trainer.precision=32-true", f"outputs={tmp_path / 'outputs'}")  # fmt: skip
    while "\nstep" not in (tmp_path / "stdout").read_text():
        assert first.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    (second,) = [
        child for child in psutil.Process(first.pid).children() if "train.py" in child.cmdline()[1]
    ]
    os.kill(first.pid if victim == "first" else second.pid, signal.SIGKILL)
    first.join(timeout=60)
    psutil.wait_procs([second], timeout=60)
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
    said = (tmp_path / "stderr").read_text()  # both write there
    (line,) = said.strip().splitlines()
    if victim == "second":
        assert first.exitcode == 1
        assert line.startswith("Process 2 of 2 was killed by SIGKILL")
        assert rows(tmp_path / "outputs", "select status from runs") == [("FAILED",)]
    else:
        assert line.startswith("Process 1 of 2 is gone")


def test_a_process_that_waits_for_one_that_is_gone_hears_of_it(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE_S", 1.0)
    launcher = processes._Launcher(LightningEnvironment(), 3, 1)
    launcher.procs = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    over, heard = threading.Event(), []
    watch = threading.Thread(target=launcher.watch, args=(over, heard.append))
    watch.start()
    launcher.procs[1].kill()
    watch.join(timeout=30)
    assert not watch.is_alive()
    assert heard == ["Process 3 of 3 was killed by SIGKILL, so training cannot go on."]
    assert launcher.procs[0].wait(timeout=30) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
def test_synchronised_batch_norm_computes_the_same_alone(name):
    torch.manual_seed(0)
    encoder = Encoder(name, stage=2)
    pages = torch.randint(0, 255, (3, 1, 64, 64), dtype=torch.uint8)
    encoder(pages)  # statistics of its own
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = encoder.eval()(pages)
    synchronised = synchronise_batch_norms(encoder)
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in synchronised.modules())
    torch.testing.assert_close(synchronised(pages), expected)
    after = synchronised.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("freeze", "differ"), [("true", False), ("false", True)])
def test_batch_norm_of_several_processes_on_cpus_is_told(freeze, differ):
    overrides = ["model=tiny", f"model.encoder.freeze={freeze}", "trainer=cpu", "trainer.devices=2"]
    experiment = validate(compose(overrides))
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary)
    assert norms_that_differ(recognizer) is differ
    assert build.differing_norms(experiment, recognizer) is differ
    experiment.trainer.devices = 1
    assert not build.differing_norms(experiment, recognizer)
