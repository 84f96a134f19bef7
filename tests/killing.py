"""Trainings in child processes that are killed, from a parent that has imported everything once."""

import json
import os
import random
import signal
import sqlite3
import time
import traceback
from pathlib import Path

import torch
from paragraph_ocr.errors import Stopped, UserError
from paragraph_ocr.validation import compose, validate
from safetensors.torch import load_file

TIMINGS = ("images_per_second", "minutes", "gpu_memory_gib", "system/")


def start(typed):
    """Fork a child that runs what `python train.py` with these words would, and return its pid."""
    import paragraph_ocr.run as running  # before the fork, and once

    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        running.run(validate(compose(typed)), overrides=typed)
        status = 0
    except UserError:
        status = 2
    except (Stopped, KeyboardInterrupt, SystemExit):  # Lightning makes the third of the second
        status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(typed):
    """Run to the end and return the exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start(typed), 0)[1])


def kill_until_done(typed, outputs, *, kills, number=signal.SIGKILL, dice=None):
    """Start and kill a training `kills` times, then let it come to its end.

    Each time at a random moment: after none to four further checkpoints (seldom before the first), and
    a part of a second. Every start but the first goes on with the run of the first.

    Returns:
        The names of the newest checkpoint at each kill, None where there was none yet.
    """
    dice = dice or random.Random(0)
    struck = []
    while True:
        again = go_on(outputs) or typed
        pid = start(again)
        if len(struck) < kills:
            further = dice.choice([0, 1, 1, 2, 3, 4])
            until_further_checkpoints(pid, outputs, further)
            wait(pid, dice.uniform(0, 0.5))
        else:
            wait(pid, 240)
        if has_ended(pid):
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == 0, status
            return struck
        os.kill(pid, number)
        os.waitpid(pid, 0)
        assert len(struck) < kills, "it did not end"
        struck.append(newest(outputs))


def go_on(outputs):
    """Return what is typed to go on with the one run, None if it has no folder yet."""
    folders = [path.parent for path in (outputs / "runs").glob("*/config.yaml")]
    return [f"resume={folders[0]}"] if folders else None


def newest(outputs):
    """Return the name of the newest checkpoint of the one run, or None."""
    return max((path.name for path in outputs.glob("runs/*/checkpoints/step_*")), default=None)


def until_further_checkpoints(pid, outputs, count, *, seconds=120):
    """Wait until `count` checkpoints were written from now on, or the child has ended."""
    seen, last, until = 0, newest(outputs), time.monotonic() + seconds
    while seen < count and not has_ended(pid):
        assert time.monotonic() < until, "no further checkpoint"
        if newest(outputs) != last:
            seen, last = seen + 1, newest(outputs)
        time.sleep(0.002)


def has_ended(pid):
    """Return whether the child has ended; it is left to be collected."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(pid, seconds):
    """Wait until the child has ended or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not has_ended(pid):
        time.sleep(0.002)


def result(outputs):
    """Return weights, training state and metrics of the one run below a folder, to be compared."""
    (folder,) = (path.parent for path in (outputs / "runs").glob("*/config.yaml"))
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    files = {
        name: load_file(path)
        for name, path in {
            "weights": last / "weights.safetensors",
            "best": folder / "best.safetensors",
            "last": folder / "last.safetensors",
        }.items()
    }
    return {
        **files,
        "step": last.name,
        "optimizer": state["optimizer_states"],
        "schedule": state["lr_schedulers"],
        "random": state["between"]["random"],
        "metrics": metrics(outputs / "mlflow.db"),
        "status": json.loads((folder / "run.json").read_text())["status"],
    }


def metrics(database):
    """Return {(metric, step): value} of the one run, timings left out; repeats must be identical."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("select status from runs").fetchall() == [("FINISHED",)]
        rows = connection.execute("select key, step, value, is_nan from metrics").fetchall()
    found = {}
    for key, step, value, is_nan in rows:
        if key.startswith(TIMINGS):
            continue
        value = None if is_nan else value
        assert found.setdefault((key, step), value) == value, (key, step)
    return found


def same(one, other):
    """Return whether two trees of plain values and tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one, other):
    for key in one:
        if key == "metrics" and one[key] != other[key]:
            different = {k for k in one[key] | other[key] if one[key].get(k) != other[key].get(k)}
            raise AssertionError(f"metrics differ: {sorted(different)[:20]}")
        assert same(one[key], other[key]), f"{key} differs"


def outputs_of(folder: Path, typed):
    return [*typed, f"outputs={folder}"]
