"""Searches whose trials take a second: tiny models on noise."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from commands import run_command

ROOT = Path(__file__).parents[2]

SEARCH = """# @package _global_
defaults:
  - override /hydra/sweeper: study
  - override /hydra/sweeper/sampler: random
  - override /model: tiny
  - override /datamodule: fake
  - override /regularization: none
hydra:
  mode: MULTIRUN
  sweeper:
    study_name: quick
    objective: val/loss
    n_trials: 4
    params: {optimizer.lr: "tag(log, interval(1e-4, 1e-2))"}
model: {decoder: {depth: 1}}
decoding: {max_loss: 0.0}
datamodule: {num_train: 8}
trainer: {overfit_batches: 1, max_epochs: 2, check_val_every_n_epoch: 2, limit_test_batches: 0}
tracking: {system_metrics: false, num_samples: 0}
"""


def make_conf(folder: Path) -> Path:
    """Return a folder for further YAML files; it holds `search=quick`."""
    (folder / "search").mkdir(parents=True)
    (folder / "experiment").mkdir()
    (folder / "search" / "quick.yaml").write_text(SEARCH)
    return folder


def command(conf: Path, outputs: Path, *arguments: str) -> list[str]:
    typed = ["--config-dir", str(conf), "search=quick", f"outputs={outputs}", *arguments]
    return [sys.executable, str(ROOT / "train.py"), *typed]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}


def search(
    conf: Path, outputs: Path, *arguments: str, more_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    _, script, *typed = command(conf, outputs, *arguments)
    return run_command(script, *typed, cwd=outputs.parent, env=environment(), more_bytes=more_bytes)


def runs(outputs: Path) -> list[dict[str, str]]:
    """Return MLflow's runs: status, name and tags."""
    with sqlite3.connect(outputs / "mlflow.db") as database:
        listed = []
        for run, name, status in database.execute("select run_uuid, name, status from runs"):
            tags = dict(database.execute("select key, value from tags where run_uuid = ?", (run,)))
            listed.append({"run": run, "name": name, "status": status, **tags})
    return listed
