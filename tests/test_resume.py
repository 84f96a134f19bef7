"""A run that is killed, interrupted or lengthened goes on as if nothing had happened."""

import itertools
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import killing
from killing import QUICK
from paragraph_ocr import console
from small_curriculum import SMALL_CURRICULUM

IN_STEPS = ["trainer.accumulate_grad_batches=2", "regularization.ema=0.9"]
WORKERS = ["datamodule.num_workers=2", "regularization.augment_on=workers"]
ENOUGH = ["datamodule.batch_size=2", "trainer.limit_train_batches=6", "trainer.limit_val_batches=1",
          "trainer.limit_test_batches=1", "datamodule.max_length=900", "datamodule.height=64",
          "datamodule.width=256", "decoding.max_loss=0.1"]  # fmt: skip
"""For data modules of real corpora: small pages, and nothing read that could not be read anyway."""

FEW = ["datamodule.batch_size=8", "datamodule.num_train=48", "datamodule.num_val=8",
       "datamodule.num_test=8", "decoding.max_loss=0.1"]  # fmt: skip
"""For EMNIST's characters, of which there are as many as one asks for."""

ON_GPU = [
    "model=small", "datamodule=fake", "trainer=gpu", "trainer.compile=true", "trainer.max_epochs=12",
    "regularization=standard", "optimizer=sgd", "schedule=constant", "decoding.max_loss=0.1",
    "tracking.system_metrics=false", "trainer.checkpoint.every_n_steps=4",
]  # fmt: skip
"""96 steps of plain momentum, which does not blow up rounding as Muon does: a lost momentum would show."""


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


def quick(outputs, *more):
    return [*QUICK, *more, f"outputs={outputs}"]


def kinds(iam_copies, emnist, tmp_path):
    """Return for each kind of data module what is typed to train on a little of it."""
    iam = f"datamodule.root={iam_copies / 'half'}"
    characters = f"datamodule.root={emnist['gzip archive']}"
    return {
        "fake": [],
        "synthetic_notes": ["datamodule=synthetic_notes", "debug=ci"],
        "synthetic_lines": [
            "datamodule=synthetic_lines",
            "debug=ci",
            "model=line_cnn",
            "datamodule.max_lines=1",
            "model.channels=4",
        ],
        "synthetic_paragraphs": ["datamodule=synthetic_paragraphs", "debug=ci"],
        "iam_lines": ["datamodule=iam_lines", iam, *ENOUGH],
        "iam_paragraphs": ["datamodule=iam_paragraphs", iam, *ENOUGH],
        "iam_synthetic_paragraphs": ["datamodule=iam_synthetic_paragraphs", iam, *ENOUGH],
        "iam_original_and_synthetic": ["datamodule=iam_original_and_synthetic", iam, *ENOUGH],
        "emnist": ["datamodule=emnist", characters, *FEW],
        "emnist_lines": ["datamodule=emnist_lines", characters, *FEW],
        "folder": ["datamodule=folder", f"datamodule.root={tmp_path}", *ENOUGH],
    }


def killed_and_unbroken(tmp_path, typed, *, kills, seed=0, stores=None):
    """Run twice, once killed again and again, compare, and return the kills that struck.

    Args:
        stores: the pages of the unbroken run, which else renders its own, as the other does.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    if stores is not None:
        shutil.copytree(stores, one / "data")
    assert killing.run([*typed, f"outputs={one}"]) == 0
    struck = killing.kill_until_done(
        [*typed, f"outputs={other}"], other, kills=kills, dice=random.Random(seed)
    )
    killing.assert_same(killing.result(one), killing.result(other))
    return struck


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    calm = "regularization.calm_after=0.5"  # augmentation changes in the course of it
    typed = [*QUICK, *IN_STEPS, "trainer.max_epochs=10", calm]
    struck = killed_and_unbroken(tmp_path, typed, kills=3)
    assert len([step for step in struck if step]) >= 2


def test_so_does_one_whose_workers_stack_and_augment_its_pages(tmp_path, iam_copies):
    typed = [
        *QUICK, "datamodule=iam_original_and_synthetic", f"datamodule.root={iam_copies / 'half'}",
        "datamodule.dataset_len=14", *ENOUGH, *WORKERS, "optimizer=adamw", "schedule=one_cycle",
    ]  # fmt: skip
    typed.remove("debug=ci")
    struck = killed_and_unbroken(tmp_path, typed, kills=2, seed=2)
    assert any(struck)


def test_so_does_one_that_follows_a_curriculum(tmp_path, curriculum_stores):
    typed = [
        "model=tiny", *SMALL_CURRICULUM, "trainer=cpu", "regularization=standard",
        "trainer.max_epochs=8", "trainer.checkpoint.every_n_steps=1",
        "schedule=warmup_stable_decay", "schedule.warmup_steps=3",
    ]  # fmt: skip
    struck = killed_and_unbroken(tmp_path, typed, kills=3, seed=1, stores=curriculum_stores)
    assert len([step for step in struck if step]) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_says_so_and_goes_on(number, unbroken, outputs, tmp_path):
    said = tmp_path / "said"
    # no checkpoint but those that the signal asks for
    pid = killing.start(quick(outputs, "trainer.checkpoint.every_n_steps=null"), said=said)
    killing.until(pid, lambda: "step 4 " in said.read_text())
    os.kill(pid, number)
    assert killing.collect(pid) == 1
    assert killing.newest(outputs) >= "step_00000004"
    assert killing.statuses(outputs / "mlflow.db") == ["KILLED"]
    assert killing.story(outputs)["status"] == "interrupted"
    assert f"Go on with: python train.py resume={killing.folder_of(outputs)}" in said.read_text()
    assert killing.run(killing.go_on(outputs)) == 0
    killing.assert_same(killing.result(unbroken), killing.result(outputs))


def test_resume_auto_goes_on_with_the_newest_unfinished_run_and_else_begins_one(outputs, tmp_path):
    typed = quick(outputs, "resume=auto")
    pid = killing.start(typed)
    killing.until(pid, lambda: killing.newest(outputs))
    os.kill(pid, signal.SIGKILL)
    killing.collect(pid)
    # typed anew: other limits are allowed, another rate is another experiment
    assert killing.run([*typed, "trainer.max_epochs=1"]) == 0
    folder = killing.folder_of(outputs)
    assert killing.statuses(outputs / "mlflow.db") == ["FINISHED"]
    assert killing.run([*typed, "trainer.max_epochs=1"]) == 0
    assert len([*outputs.glob("runs/*")]) == 2, "the first is finished"
    (outputs / "runs" / "interrupted").mkdir()
    shutil.copy(folder / "config.yaml", outputs / "runs" / "interrupted")
    assert killing.run([*typed, "trainer.max_epochs=1", "optimizer.lr=0.5"]) == 0
    assert len([*outputs.glob("runs/*")]) == 4


def test_a_finished_run_goes_on_if_it_is_given_more_epochs(unbroken, outputs):
    constant = ["schedule=constant"]  # another length would bend another schedule
    assert killing.run(quick(outputs / "whole", *constant)) == 0
    assert killing.run(quick(outputs / "parts", *constant, "trainer.max_epochs=2")) == 0
    before = killing.result(outputs / "parts")
    again = killing.go_on(outputs / "parts")
    assert killing.run(again) == 0, "nothing is left to do"
    killing.assert_same(before, killing.result(outputs / "parts"))
    assert killing.run([*again, "trainer.max_epochs=3"]) == 0
    whole, parts = killing.result(outputs / "whole"), killing.result(outputs / "parts")
    assert killing.same(whole["weights"], parts["weights"])
    assert killing.same(whole["optimizer"], parts["optimizer"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills_over_every_kind_of_data_module(tmp_path, iam_copies, emnist, capsys):
    def record(line):
        with capsys.disabled():
            console.say(line)

    pages = tmp_path / "pages"
    write_folder(pages)
    styles = [[], IN_STEPS, WORKERS, [*IN_STEPS, *WORKERS, "trainer.val_check_interval=0.5"]]
    total = 0
    for number, (kind, typed) in enumerate(kinds(iam_copies, emnist, pages).items()):
        words = [w for w in QUICK if kind in ("fake",) or w not in ("datamodule=fake", "debug=ci")]
        words = [w for w in words if "model=line_cnn" not in typed or w != "model=tiny"]
        folder = tmp_path / kind
        struck = killed_and_unbroken(
            folder,
            [*words, *typed, *styles[number % 4], "trainer.max_epochs=14"],
            kills=10,
            seed=number,
        )
        after = len([step for step in struck if step])
        total += len(struck)
        words = " ".join(styles[number % 4])
        record(f"{kind:28} {words:60} {len(struck)} kills, {after} after a checkpoint")
        assert after > len(struck) / 2
    record(f"{total} kills in all")
    assert total >= 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
def test_on_a_gpu_resumed_runs_stray_no_further_than_unbroken_ones(tmp_path):
    def unbroken(number):
        folder = tmp_path / f"unbroken{number}"
        assert killing.collect(killing.start_anew([*ON_GPU, f"outputs={folder}"])) == 0
        return killing.weights(folder)

    def resumed(number):
        folder = tmp_path / f"resumed{number}"
        struck = killing.kill_until_done(
            [*ON_GPU, f"outputs={folder}"],
            folder,
            kills=4,
            dice=random.Random(number),
            begin=killing.start_anew,
        )
        assert any(struck)
        return killing.weights(folder)

    with ThreadPoolExecutor(5) as together:  # most of their time is imports
        whole = [together.submit(unbroken, number) for number in range(3)]
        broken = [together.submit(resumed, number) for number in range(2)]
        whole, broken = ([run.result() for run in runs] for runs in (whole, broken))

    def furthest(pairs):
        return max(float((one - other).norm() / one.norm()) for one, other in pairs)

    spread = furthest(itertools.combinations(whole, 2))
    apart = furthest(itertools.product(whole, broken))
    console.say(f"weights apart: unbroken {spread:.4g}, resumed {apart:.4g}")
    # at least rounding: it may be luck if none of three differs
    assert apart <= 2 * max(spread, 0.01)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_on_a_gpu_deterministic_runs_go_on_with_the_same_bits(tmp_path, compiled):
    typed = [*ON_GPU, "trainer.deterministic=true", f"trainer.compile={compiled}"]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    whole = killing.start_anew([*typed, f"outputs={unbroken}"])
    struck = killing.kill_until_done(
        [*typed, f"outputs={resumed}"], resumed, kills=2, begin=killing.start_anew
    )
    assert any(struck)
    assert killing.collect(whole) == 0
    killing.assert_same(killing.result(unbroken), killing.result(resumed))


def write_folder(folder):
    """Write a folder of images and transcriptions, 20 of the package's own pages."""
    import cv2
    import numpy as np

    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(20):
        page = np.full((60, 200), 255, np.uint8)
        cv2.putText(page, f"page {index}", (5, 40), cv2.FONT_HERSHEY_SCRIPT_SIMPLEX, 1.0, 0, 2)
        page -= generator.integers(0, 10, page.shape, np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), page)
        (folder / f"{index}.txt").write_text(f"page {index}")
