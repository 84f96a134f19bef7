"""Trainings in child processes that are killed, from a parent that has imported everything once."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TIMINGS = ("images_per_second", "minutes", "gpu_memory_gib", "system/")

QUICK = [
    "model=tiny", "datamodule=fake", "debug=ci", "trainer=cpu", "regularization=standard",
    "trainer.max_steps=-1", "trainer.max_epochs=3", "trainer.checkpoint.every_n_steps=1",
]  # fmt: skip
"""Twelve steps with dropout, noise and augmentation, a checkpoint at each."""


def command():
    """Return train.py as a module, with all that it imports in the course of a run."""
    if "train_command" not in sys.modules:
        import paragraph_ocr.run  # noqa: F401  (before the fork, and once)

        specification = importlib.util.spec_from_file_location("train_command", ROOT / "train.py")
        module = importlib.util.module_from_spec(specification)
        sys.modules["train_command"] = module
        specification.loader.exec_module(module)
    return sys.modules["train_command"]


def start(typed, *, said=os.devnull, inject=None):
    """Fork a child that runs `python train.py` with these words, and return its pid.

    Args:
        said: file for standard output and error.
        inject: called in the child before; a fault from outside, such as a number that is none.
    """
    train = command()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid:
        os.close(output)
        return pid
    status = 70
    try:
        torch.set_num_threads(1)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        sys.argv = ["train.py", *typed]
        if inject is not None:
            inject()
        status = train.main()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 71  # what Python would make 1 of, with its traceback
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def start_anew(typed):
    """Do so in a new interpreter: a fork cannot use CUDA once its parent has looked for it."""
    output = os.open(os.devnull, os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    words = [sys.executable, str(ROOT / "train.py"), *typed]
    pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=actions)
    os.close(output)
    return pid


def run(typed, **how):
    """Run to the end and return the exit status."""
    return collect(start(typed, **how))


def collect(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_until_done(typed, outputs, *, kills, number=signal.SIGKILL, dice=None, begin=start):
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
        pid = begin(again)
        if len(struck) < kills:
            further = dice.choice([0, 1, 1, 2, 3, 4])
            until_further_checkpoints(pid, outputs, further)
            wait(pid, dice.uniform(0, 0.15))
        else:
            wait(pid, 900)
        if has_ended(pid):
            status = collect(pid)
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


def until_further_checkpoints(pid, outputs, count, *, seconds=600):
    """Wait until `count` checkpoints were written from now on, or the child has ended."""
    seen, last, until = 0, newest(outputs), time.monotonic() + seconds
    while seen < count and not has_ended(pid):
        assert time.monotonic() < until, "no further checkpoint"
        if newest(outputs) != last:
            seen, last = seen + 1, newest(outputs)
        time.sleep(0.002)


def until(pid, seen, *, seconds=120):
    """Wait until something is seen, while the child is at work."""
    deadline = time.monotonic() + seconds
    while not seen():
        assert not has_ended(pid), "it ended before"
        assert time.monotonic() < deadline, "it was not seen"
        time.sleep(0.002)


def has_ended(pid):
    """Return whether the child has ended; it is left to be collected."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(pid, seconds):
    """Wait until the child has ended or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not has_ended(pid):
        time.sleep(0.002)


def folder_of(outputs):
    """Return the one run folder."""
    (folder,) = (path.parent for path in (outputs / "runs").glob("*/config.yaml"))
    return folder


def story(outputs):
    return json.loads((folder_of(outputs) / "run.json").read_text())


def result(outputs):
    """Return weights, training state and metrics of the one run below a folder, to be compared."""
    folder = folder_of(outputs)
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
        # without Python's own generator: beartype, which checks types in tests, draws from it
        "random": [{**s, "python": None} for s in state["between"]["random"]],
        "metrics": metrics(outputs / "mlflow.db"),
        "status": story(outputs)["status"],
    }


def weights(outputs):
    """Return the matrices of the one run's newest checkpoint, all in one vector."""
    file = folder_of(outputs) / "checkpoints" / newest(outputs) / "weights.safetensors"
    matrices = [tensor for _, tensor in sorted(load_file(file).items()) if tensor.ndim > 1]
    return torch.cat([matrix.double().flatten() for matrix in matrices])


def metrics(database):
    """Return {(metric, step): value} of the one run, timings left out; repeats must be identical."""
    assert statuses(database) == ["FINISHED"]
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select key, step, value, is_nan from metrics").fetchall()
    found = {}
    for key, step, value, is_nan in rows:
        if key.startswith(TIMINGS):
            continue
        value = None if is_nan else value
        assert found.setdefault((key, step), value) == value, (key, step)
    return found


def statuses(database):
    """Return the status of each run in an MLflow database, in the order in which they began."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select status from runs order by start_time").fetchall()
    return [status for (status,) in rows]


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
