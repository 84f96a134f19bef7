"""`train.py` as a command: help, mistakes and their exit status, sweeps."""

import os
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import run_command, start_command

ROOT = Path(__file__).parents[1]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("train.py", *arguments, env=WITHOUT_GPU)


def train_anew(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it in a Python of its own, for what its imports do or take."""
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**WITHOUT_GPU, **variables},
        capture_output=True,
        text=True,
    )


def seconds_of_children() -> float:
    """Return the CPU's seconds: those of the clock depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_names_every_choice_soon():
    began = seconds_of_children()
    shown = train_anew("--help")
    seconds = seconds_of_children() - began
    assert shown.returncode == 0
    for file in (ROOT / "conf").rglob("*/*.yaml"):
        assert file.stem in shown.stdout
    assert "schema" not in shown.stdout
    # half a second on an idle machine: 0.1 s were measured
    assert seconds < 1.5


def test_the_whole_config_is_printed_without_importing_torch():
    shown = train_anew("--cfg", "job", "model=base", PYTHONPROFILEIMPORTTIME="1")
    assert shown.returncode == 0
    assert "name: resnet18" in shown.stdout
    assert "| torch\n" not in shown.stderr


@pytest.fixture(scope="module")
def own_conf(tmp_path_factory):
    """Return a folder of YAML files with a mistake in each, as a user might write them."""
    folder = tmp_path_factory.mktemp("conf") / "experiment"
    folder.mkdir()
    mistakes = {
        "misspelt": "datamodule: {bacth_size: 3}",
        "wrong_type": "datamodule: {batch_size: lots}",
        "no_yaml": "trainer: {max_epochs: 3}\n bad",
        "new_node": "trainr: {max_epochs: 3}",
    }
    for name, text in mistakes.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return folder.parent


MISTAKES = [
    (["model=smal"], "model=small"),
    (["datamodule=0"], "must be a string"),
    (["+hydra.callbacks.x._target_=os.system"], "names code"),
    (["modle=small"], "nearest: model"),
    (["model/encoder=resnet19"], "model/encoder=resnet18"),
    (["model.encoder=resnet18"], "model/encoder=<choice>"),
    (["model.encoder.name=resnt50"], "nearest: resnet50"),
    (["model.encoder.stage=9"], "model.encoder.stage=9"),
    (["model.encoder.horizontal_stride=5"], "model.encoder.horizontal_stride=5"),
    (["+model.encoder.extra.colour=red"], "model.encoder.extra"),
    (["model.encoder.name=resnet18", "model.encoder.pretrained=true"], "model.encoder.pretrained"),
    (["model.encoder.name=vit_small_resnet26d_224"], "does not take pages of"),
    (["trainer.max_epoch=3"], "trainer.max_epochs"),
    (["++trainer.max_epoch=3"], "trainer.max_epochs"),
    (["+model.lrr=1"], "optimizer.lr"),
    (["datamodule.batch_size=lots"], "a whole number"),
    (["datamodule.batch_size=0"], "must lie in"),
    (["trainer.overfit_batches=abc"], "1 is one batch"),
    (["optimizer.lr=fast"], "a number"),
    (["+optimizer.extra.colour=1"], "optimizer.extra"),
    (["optimizer.extra={colour: 1}"], "+optimizer.extra.<argument>"),
    (["seed"], "key=value"),
    (["~model"], "has no value"),
    (["model.decoder.heads=3"], "not divisible"),
    (["model.decoder.width=18", "model.decoder.heads=1"], "divisible by 4"),
    (["datamodule.max_length=100"], "too short"),
    (["model.weights=nowhere"], "does not exist"),
    (["model.weights=README.md"], "cannot be read"),
    (["datamodule.texts=nowhere"], "is not a folder"),
    (["trainer=gpu"], "trainer=cpu"),
    (["trainer.precision=16-mixed"], "needs a GPU"),
    (["trainer.devices=-3"], "trainer"),
    (["experiment=misspelt"], "datamodule.batch_size"),
    (["experiment=wrong_type"], "a whole number"),
    (["experiment=no_yaml"], "line 3"),
    (["experiment=new_node"], "nearest: trainer"),
    (["-m", "model=tiny,smal", "tracking=off"], "model=small"),
    (["trainer=ddp", "trainer.overfit_batches=1"], "Pass trainer.devices=1"),
    (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp"),
    (["-m", "search=learning_rate", "trainer.devices=2"], "does not go with a search"),
    (["-m", "model=tiny,small", "trainer=ddp", "tracking=off"], "trainer.devices=1"),
]


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_line_with_the_remedy_and_status_2(typed, said, own_conf, tmp_path):
    outputs = tmp_path / "outputs"
    typed = ["--config-dir", str(own_conf), *typed, f"outputs={outputs}"]
    if "model.encoder.pretrained=true" in typed:  # the hub's client takes its places when imported
        done = train_anew(*typed, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    else:
        done = train(*typed)
    last = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(last) == 1, done.stderr
    assert said in last[0]
    assert not (outputs / "data").exists(), "no data may be touched"


@pytest.mark.parametrize("typed", ["model=smal", "trainer.max_epoch=3", "datamodule.batch_size=0"])
def test_what_is_mistyped_is_told_before_torch_is_imported(typed):
    began = seconds_of_children()
    done = train_anew(typed, PYTHONPROFILEIMPORTTIME="1")
    seconds = seconds_of_children() - began
    assert done.returncode == 2
    assert "| torch\n" not in done.stderr
    # 0.7 s were measured on a slow machine
    assert seconds < 3


def test_a_grid_is_four_runs_in_four_folders_under_one_parent(tmp_path):
    done = train(
        "-m",
        "model=tiny,small",
        "optimizer.lr=1e-3,3e-4",
        "trainer.overfit_batches=1",
        "debug=quick",
        "datamodule=fake",
        f"outputs={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select run_uuid, name, status from runs").fetchall()
        parents = dict(
            database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'")
        )
        folders = dict(database.execute("select run_uuid, value from tags where key = 'folder'"))
    (parent,) = {run for run, _, _ in runs} - set(parents)
    assert len(parents) == 4
    assert set(parents.values()) == {parent}
    assert {status for _, _, status in runs} == {"FINISHED"}
    assert len({Path(folder).resolve() for folder in folders.values()}) == 4
    assert all((ROOT / folder / "config.yaml").exists() for folder in folders.values())
    assert len({name for _, name, _ in runs}) == 5
    assert not (ROOT / "mlflow.db").exists(), "MLflow's default place was written to"


def test_a_run_that_breaks_says_failed_in_mlflow_and_ends_with_status_1(tmp_path):
    (tmp_path / "data").write_text("a file where the folder of stores should be")
    done = train("model=tiny", "debug=ci", "datamodule=fake", f"outputs={tmp_path}")
    assert done.returncode == 1
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]


def test_a_run_that_is_terminated_says_killed_in_mlflow(tmp_path):
    typed = ["model=tiny", "datamodule=fake", "trainer.max_epochs=100000", f"outputs={tmp_path}"]
    streams = [tmp_path / "stdout", tmp_path / "stderr"]
    running = start_command("train.py", *typed, env=WITHOUT_GPU, streams=streams)
    while "\nstep" not in streams[0].read_text():
        assert running.is_alive(), streams[1].read_text()
        time.sleep(0.02)
    running.terminate()
    running.join(timeout=60)
    assert running.exitcode == 1
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("KILLED",)]
