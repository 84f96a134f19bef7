"""What a person sees, what MLflow says and what is kept, whatever goes wrong: docs/reliability.md's table."""

import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from torch.utils.data import dataloader

import killing
from killing import QUICK
from paragraph_ocr.ends import explain_end
from paragraph_ocr.validation import compose, validate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """Return the outputs of QUICK, killed after its fifth step."""
    outputs = tmp_path_factory.mktemp("stopped")
    pid = killing.start([*QUICK, f"outputs={outputs}"])
    killing.until(pid, lambda: (killing.newest(outputs) or "") >= "step_00000005")
    os.kill(pid, signal.SIGKILL)
    killing.collect(pid)
    assert killing.statuses(outputs / "mlflow.db") == ["RUNNING"]
    return outputs


@pytest.fixture
def outputs(stopped, tmp_path):
    """Return a copy of the killed run, to be damaged."""
    return shutil.copytree(stopped, tmp_path / "outputs")


def checkpoints(outputs):
    """Return the checkpoints of the one run, the oldest first."""
    return sorted((killing.folder_of(outputs) / "checkpoints").glob("step_*"))


def resume(outputs, tmp_path, *typed, **how):
    """Go on with the one run; return exit status and what was said."""
    said = tmp_path / "said"
    status = killing.run([f"resume={killing.folder_of(outputs)}", *typed], said=said, **how)
    return status, said.read_text()


def the_line(said):
    """Return the one line of a refusal, which is all that is said but for the progress before it."""
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


# -- damaged checkpoints ---------------------------------------------------------------------------


def torn(outputs):
    file = checkpoints(outputs)[-1] / "weights.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def emptied(outputs):
    os.truncate(checkpoints(outputs)[-1] / "state.pt", 0)


def bit_flipped(outputs):
    file = checkpoints(outputs)[-1] / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def file_missing(outputs):
    (checkpoints(outputs)[-1] / "weights.safetensors").unlink()


def label_torn(outputs):
    file = checkpoints(outputs)[-1] / "checkpoint.json"
    os.truncate(file, file.stat().st_size // 2)


def half_written_beside(outputs):
    newest = checkpoints(outputs)[-1]
    shutil.copytree(newest, newest.with_name(".step_00000099.part"))


def best_deleted(outputs):
    for file in killing.folder_of(outputs).glob("best.safetensors"):
        file.unlink()


def story_torn(outputs):
    (killing.folder_of(outputs) / "run.json").write_text('{"name": ')


def store_deleted(outputs):
    for file in (outputs / "data").glob("*.h5"):
        file.unlink()


def store_of_another_run(outputs):
    (file,) = (outputs / "data").glob("*.h5")
    other = outputs.parent / "other"
    assert killing.run([*QUICK, "trainer.max_steps=1", "seed=5", f"outputs={other}"]) == 0
    (another,) = (other / "data").glob("*.h5")
    shutil.copy(another, file)


def store_torn(outputs):
    (file,) = (outputs / "data").glob("*.h5")
    os.truncate(file, file.stat().st_size // 3)


def store_is_text(outputs):
    (file,) = (outputs / "data").glob("*.h5")
    file.write_text("not a store")


def all_checkpoints_deleted(outputs):
    shutil.rmtree(killing.folder_of(outputs) / "checkpoints")


MENDED = [
    torn, emptied, bit_flipped, file_missing, label_torn, half_written_beside, best_deleted,
    store_deleted, store_torn, store_is_text, store_of_another_run, all_checkpoints_deleted,
]  # fmt: skip


@pytest.mark.parametrize("damage", MENDED, ids=lambda damage: damage.__name__)
def test_a_run_goes_on_to_the_same_bits_in_spite_of(damage, unbroken, outputs, tmp_path):
    damage(outputs)
    status, said = resume(outputs, tmp_path)
    assert status == 0, said
    if damage in (torn, emptied, bit_flipped, file_missing, label_torn):
        assert "is torn" in said and "the one before it" in said
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


def all_torn(outputs):
    for folder in checkpoints(outputs):
        (folder / "state.pt").write_bytes(b"torn")


def relabel(folder, **changes):
    """Change a checkpoint's label, and let it fit its files."""
    label = json.loads((folder / "checkpoint.json").read_text()) | changes
    for name in label["files"]:
        content = (folder / name).read_bytes()
        label["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / "checkpoint.json").write_text(json.dumps(label))


def foreign(outputs):
    relabel(checkpoints(outputs)[-1], identity="0123456789abcdef")


def older_version(outputs):
    relabel(checkpoints(outputs)[-1], version=0)


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload_ran",)


def pickled(outputs):
    folder = checkpoints(outputs)[-1]
    torch.save({"state": Payload()}, folder / "state.pt")
    relabel(folder)


def config_deleted(outputs):
    (killing.folder_of(outputs) / "config.yaml").unlink()


def config_edited(outputs):
    file = killing.folder_of(outputs) / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["model"]["decoder"]["depth"] = 3
    file.write_text(yaml.safe_dump(tree))


def config_unknown_key(outputs):
    file = killing.folder_of(outputs) / "config.yaml"
    file.write_text(file.read_text() + "\nweights_path: /etc/passwd\n")


def store_edited(outputs):
    """Change a transcription, as nothing in the project does."""
    (path,) = (outputs / "data").glob("*.h5")
    with h5py.File(path, "r+") as file:
        file["text"][3] = "another text"


REFUSED = {
    all_torn: "holds no whole checkpoint",
    foreign: "belongs to another experiment",
    older_version: "has version 0",
    pickled: "cannot be read",
    config_deleted: "has no config.yaml",
    config_edited: "belongs to another experiment",
    config_unknown_key: "weights_path is not a key",
    store_edited: "holds other paragraphs",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_a_run_refuses_in_one_line(damage, outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, kept = killing.folder_of(outputs), killing.newest(outputs)
    damage(outputs)
    said = tmp_path / "said"
    assert killing.run([f"resume={folder}"], said=said) == 2, said.read_text()
    assert REFUSED[damage] in the_line(said.read_text())
    assert killing.newest(outputs) == kept
    assert not list(tmp_path.rglob("payload_ran"))
    # nothing had begun, or it is told that it failed
    assert killing.statuses(outputs / "mlflow.db") in (["RUNNING"], ["FAILED"])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["resume=outputs/runs/mistyped"], "is no run folder"),
        (["resume={run}", "optimizer.lr=1"], "would change a run that goes on"),
        (["resume={run}", "model=small"], "would change a run that goes on"),
        (["resume={run}", "trainer.max_epoch=9"], "trainer.max_epochs"),
    ],
    ids=["mistyped_folder", "changed_value", "changed_group", "mistyped_key"],
)
def test_what_is_typed_wrong_costs_a_line_and_makes_no_folder(typed, line, stopped, tmp_path):
    folder = killing.folder_of(stopped)
    before = sorted(folder.rglob("*"))
    said = tmp_path / "said"
    assert killing.run([word.format(run=folder) for word in typed], said=said) == 2
    assert line in the_line(said.read_text())
    assert sorted(folder.rglob("*")) == before
    assert not Path("outputs/runs/mistyped").exists()


def test_a_trial_is_its_searchs_to_begin_again(outputs, tmp_path):
    file = killing.folder_of(outputs) / "config.yaml"
    file.write_text(file.read_text().replace("trial: null", "trial: 3"))
    status, said = resume(outputs, tmp_path)
    assert status == 2 and "is a trial" in the_line(said)


def test_the_second_of_two_processes_that_resume_one_run_is_refused(unbroken, outputs, tmp_path):
    first = killing.start(killing.go_on(outputs))
    killing.until(first, lambda: killing.newest(outputs) >= "step_00000007")
    os.kill(first, signal.SIGSTOP)  # so that it is at work however fast it is
    status, said = resume(outputs, tmp_path)
    os.kill(first, signal.SIGCONT)
    assert status == 2 and "another process is working on this run" in the_line(said)
    assert killing.collect(first) == 0
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


# -- MLflow ----------------------------------------------------------------------------------------


def test_a_locked_database_delays_only_what_is_told(unbroken, outputs, tmp_path):
    with sqlite3.connect(outputs / "mlflow.db", isolation_level=None) as other:
        other.execute("begin exclusive")
        status, said = resume(outputs, tmp_path, inject=impatient)
        other.execute("rollback")
    assert status == 0, said
    assert "does not answer" in said and "scripts/send.py" in said
    folder = killing.folder_of(outputs)
    assert (folder / "outbox.jsonl").exists()
    # a line that was torn by a kill harms no other
    with (folder / "outbox.jsonl").open("a") as file:
        file.write('["metrics", {"rows"')
    assert subprocess.run([*PYTHON, "scripts/send.py", folder], cwd=ROOT).returncode == 0
    assert not (folder / "outbox.jsonl").exists()
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


PYTHON = (os.sys.executable,)


def impatient():
    """Wait for a locked database for a moment, not for MLflow's five seconds at each entry."""
    connect = sqlite3.dbapi2.connect
    sqlite3.dbapi2.connect = sqlite3.connect = lambda *a, **k: connect(*a, **{**k, "timeout": 0.05})


def test_an_unreachable_server_is_waited_for_by_nobody(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs, said = tmp_path / "outputs", tmp_path / "said"
    typed = [*QUICK, f"outputs={outputs}", f"tracking.uri=http://127.0.0.1:{port}"]
    began = time.monotonic()
    assert killing.run([*typed, "trainer.max_epochs=1"], said=said) == 0, said.read_text()
    assert time.monotonic() - began < 60
    folder = killing.folder_of(outputs)
    assert "does not answer" in said.read_text()
    assert killing.story(outputs)["status"] == "finished"
    # what waits is sent once there is a database
    again = [f"resume={folder}", f"tracking.uri=sqlite:///{tmp_path / 'later.db'}"]
    assert killing.run(again, said=said) == 0, said.read_text()
    assert killing.statuses(tmp_path / "later.db") == ["FINISHED"]
    with sqlite3.connect(tmp_path / "later.db") as database:
        steps = database.execute("select count(*) from metrics where key = 'train/loss'")
        assert steps.fetchone()[0] == 4
    assert not (folder / "outbox.jsonl").exists()


def test_a_lost_database_costs_the_past_metrics_and_nothing_else(unbroken, outputs, tmp_path):
    (outputs / "mlflow.db").unlink()
    status, said = resume(outputs, tmp_path)
    assert status == 0 and "has lost the run" in said
    assert killing.statuses(outputs / "mlflow.db") == ["FINISHED"]
    whole, rest = killing.result(unbroken), killing.result(outputs)
    assert killing.same(whole["weights"], rest["weights"])
    assert rest["metrics"].items() < whole["metrics"].items()


def test_without_its_story_a_run_goes_on_as_a_new_one_in_mlflow(unbroken, outputs, tmp_path):
    story_torn(outputs)
    status, said = resume(outputs, tmp_path)
    assert status == 0, said
    assert sorted(killing.statuses(outputs / "mlflow.db")) == ["FINISHED", "RUNNING"]
    weights = killing.folder_of(outputs) / "last.safetensors"
    assert weights.read_bytes() == (killing.folder_of(unbroken) / "last.safetensors").read_bytes()


# -- disks, signals, workers -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a folder of so many MB, where the tests may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size, *options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs"]
        if not shutil.which("mount") or subprocess.run([*words, folder]).returncode:
            pytest.skip("no right to mount")
        return folder

    yield mount
    subprocess.run(["umount", folder], check=False)


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(unbroken, stopped, small_disk, tmp_path):
    size = sum(file.stat().st_size for file in stopped.rglob("*") if file.is_file())
    disk = small_disk(f"{size // 1024 + 1500}k")  # a checkpoint has 3 MB
    outputs = disk / "outputs"
    shutil.copytree(stopped, outputs)
    status, said = resume(outputs, tmp_path)
    assert status == 1 and "is full" in the_line(said)
    assert killing.newest(outputs) >= "step_00000005"
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    status, said = resume(outputs, tmp_path)
    assert status == 0, said
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


def test_a_read_only_disk_is_a_line(stopped, small_disk, tmp_path):
    disk = small_disk("100m")
    shutil.copytree(stopped, disk / "outputs")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, said = resume(disk / "outputs", tmp_path)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert status in (1, 2) and "cannot be written to" in the_line(said)


def begin(outputs, tmp_path, *typed, **how):
    """Start QUICK with more words; return pid and the file of what it says."""
    said = tmp_path / "said"
    return killing.start([*QUICK, *typed, f"outputs={outputs}"], said=said, **how), said


def test_a_second_signal_ends_at_once(tmp_path):
    outputs = tmp_path / "outputs"
    pid, _ = begin(outputs, tmp_path, "trainer.max_epochs=500", inject=slow_to_save)
    killing.until(pid, lambda: (tmp_path / "saving").exists())
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert killing.collect(pid) == 1
    assert time.monotonic() - began < 10
    assert killing.statuses(outputs / "mlflow.db") == ["KILLED"]


def slow_to_save():
    """Let saving take a minute, as on a busy network disk."""
    from paragraph_ocr.learning import checkpoint

    def save(self, *_):
        (self.folder.parents[3] / "saving").touch()
        time.sleep(60)

    checkpoint.Checkpoints.save = save


def test_a_killed_worker_is_a_line(tmp_path):
    outputs = tmp_path / "outputs"
    words = ["datamodule.num_workers=1", "datamodule.num_train=400", "trainer.max_epochs=50"]
    pid, said = begin(outputs, tmp_path, *words)
    killing.until(pid, lambda: killing.newest(outputs))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert killing.collect(pid) == 1
    assert "A worker that loads data died" in the_line(said.read_text())
    assert killing.statuses(outputs / "mlflow.db") == ["FAILED"]
    assert killing.newest(outputs)


def test_a_worker_that_is_gone_while_it_hands_over_a_batch_is_a_line_too(monkeypatch, tmp_path):
    experiment = validate(compose(["model=tiny", "datamodule=fake", "datamodule.num_workers=4"]))
    # the other end of the socket by which tensors come from a worker is no more
    monkeypatch.setattr(
        dataloader._SingleProcessDataLoaderIter,
        "_next_data",
        lambda self: connection.Client(str(tmp_path / "gone")),
    )
    with pytest.raises(FileNotFoundError) as raised:
        next(iter(dataloader.DataLoader([1])))
    assert "A worker that loads data died" in str(explain_end(raised.value, experiment, tmp_path))
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "a page").read_bytes()
    assert explain_end(raised.value, experiment, tmp_path) is None


def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from_but_the_beginning(
    unbroken, tmp_path
):
    outputs = tmp_path / "outputs"
    pid, _ = begin(outputs, tmp_path, inject=slow_to_prepare)
    killing.until(pid, lambda: list(outputs.glob("runs/*/run.json")))
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    assert killing.collect(pid) == 1
    assert killing.statuses(outputs / "mlflow.db") == ["KILLED"]
    assert killing.run(killing.go_on(outputs)) == 0
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


def slow_to_prepare():
    from paragraph_ocr.data.datamodule import ParagraphDataModule

    ParagraphDataModule.prepare_data = lambda self: time.sleep(60)


def test_a_clock_that_jumps_changes_no_bit(unbroken, tmp_path):
    outputs = tmp_path / "outputs"
    pid, said = begin(outputs, tmp_path, "trainer.checkpoint.every_s=1", inject=jumping_clock)
    assert killing.collect(pid) == 0, said.read_text()
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


def jumping_clock():
    """Let the wall clock leap a day back and forth at each look."""
    true, leaps = time.time, iter(range(10**9))
    time.time = lambda: true() + (86_400 if next(leaps) % 2 else -86_400)


# -- numbers and memory ----------------------------------------------------------------------------


@dataclass
class NotANumber:
    """Makes the loss of some training steps NaN."""

    steps: Callable[[int], bool]

    def __call__(self):
        from paragraph_ocr.learning.learner import Learner
        from paragraph_ocr.model.transformer import TransformerReader

        step, loss = Learner.training_step, TransformerReader.loss
        now = {"bad": False}

        def training_step(learner, batch, batch_index):
            now["bad"] = self.steps(learner.trainer.global_step)
            try:
                return step(learner, batch, batch_index)
            finally:
                now["bad"] = False

        def spoilt(*arguments, **named):
            total, count = loss(*arguments, **named)
            return total * float("nan") if now["bad"] else total, count

        Learner.training_step, TransformerReader.loss = training_step, spoilt


AT_FIVE = NotANumber(lambda step: step == 5)
FROM_FIVE = NotANumber(lambda step: step >= 5)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    outputs = tmp_path / "outputs"
    pid, said = begin(outputs, tmp_path, inject=FROM_FIVE)
    assert killing.collect(pid) == 1
    line = the_line(said.read_text())
    assert "train/loss is nan at step 6" in line and "optimizer.lr" in line
    assert killing.statuses(outputs / "mlflow.db") == ["FAILED"]
    assert killing.newest(outputs) == "step_00000005", "of the last step that was good"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_no_number_can_be_left_out_or_taken_back(policy, tmp_path):
    outputs = tmp_path / "outputs"
    pid, said = begin(outputs, tmp_path, f"trainer.on_nan={policy}", inject=AT_FIVE)
    assert killing.collect(pid) == 0, said.read_text()
    assert "step 5: a gradient is not finite" in said.read_text()
    result = killing.result(outputs)
    assert all(torch.isfinite(t).all() for t in result["weights"].values())
    assert result["step"] == "step_00000012"


@pytest.mark.parametrize(("policy", "words"), [("rollback", "again"), ("skip", "since step")])
def test_numbers_that_stay_bad_stop_the_run_all_the_same(policy, words, tmp_path):
    outputs = tmp_path / "outputs"
    typed = [f"trainer.on_nan={policy}", "trainer.max_epochs=40", "trainer.checkpoint.every_s=null",
             "trainer.checkpoint.every_n_steps=5", "trainer.limit_val_batches=0"]  # fmt: skip
    pid, said = begin(outputs, tmp_path, *typed, inject=FROM_FIVE)
    assert killing.collect(pid) == 1
    assert words in the_line(said.read_text())
    assert killing.statuses(outputs / "mlflow.db") == ["FAILED"]


def test_memory_that_is_not_to_be_had_is_a_line_with_a_smaller_batch(tmp_path):
    outputs = tmp_path / "outputs"
    pid, said = begin(outputs, tmp_path, inject=greedy)
    assert killing.collect(pid) == 1
    line = the_line(said.read_text())
    assert "datamodule.batch_size=1 trainer.accumulate_grad_batches=2" in line
    assert killing.statuses(outputs / "mlflow.db") == ["FAILED"]


def greedy():
    """Ask for a petabyte in the third step: the allocator's refusal is real."""
    from paragraph_ocr.learning.learner import Learner

    step = Learner.training_step

    def asks(learner, batch, batch_index):
        if learner.trainer.global_step == 2:
            torch.empty(2**50, dtype=torch.uint8)
        return step(learner, batch, batch_index)

    Learner.training_step = asks


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_goes_bad_while_it_is_read_is_a_line(workers, tmp_path):
    outputs = tmp_path / "outputs"
    words = ["datamodule.num_train=60", f"datamodule.num_workers={workers}"]
    pid, said = begin(outputs, tmp_path, *words, inject=rotting)
    assert killing.collect(pid) == 2
    line = the_line(said.read_text())
    assert line.startswith(str(outputs)) and "is no whole store" in line
    assert killing.statuses(outputs / "mlflow.db") == ["FAILED"]


def rotting():
    """Overwrite the store after the fourth step."""
    from paragraph_ocr.learning.learner import Learner

    step = Learner.training_step

    def rots(learner, batch, batch_index):
        if learner.trainer.global_step == 4:
            path = learner.trainer.datamodule._datasets["train"].store.path
            with path.open("r+b") as file:
                size = path.stat().st_size
                file.seek(3000)
                file.write(b"\xff" * (size - 3000))
        return step(learner, batch, batch_index)

    Learner.training_step = rots
