"""Stages of a curriculum, drawn and followed."""

import shutil
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import pytorch_lightning as pl
import torch

from paragraph_ocr import build, build_model
from paragraph_ocr.curriculum import Curriculum, Stage
from paragraph_ocr.data.corpus import store_path
from paragraph_ocr.data.curriculum import CurriculumDataModule, prepare_beside
from paragraph_ocr.errors import UserError
from paragraph_ocr.learning.curriculum import FollowCurriculum
from paragraph_ocr.validation import compose, validate
from small_curriculum import RECIPES, SMALL_CURRICULUM

STAGES = (
    Stage({"lines": 1.0}, 8, below=0.8, max_steps=None),
    Stage({"lines": 1.0, "pages": 3.0}, 4, below=0.5, max_steps=100),
    Stage({"pages": 1.0}, 2, below=None, max_steps=None),
)


def curriculum(replay=0.2, seed=0):
    return Curriculum(STAGES, look_every=10, replay=replay, seed=seed)


def draws(plan, stage, count=4000):
    return [plan.draw(stage, step // 10, step % 10)[0] for step in range(count)]


def test_batches_come_from_corpora_and_earlier_stages_by_their_shares():
    first, second, last = (Counter(draws(curriculum(), stage)) for stage in range(3))
    assert set(first) == {(0, "lines")}
    assert second[0, "lines"] == pytest.approx(800, rel=0.15)
    assert second[1, "pages"] == pytest.approx(3200 * 3 / 4, rel=0.1)
    assert last[2, "pages"] == pytest.approx(3200, rel=0.05)
    earlier = [sum(n for (stage, _), n in last.items() if stage == number) for number in (0, 1)]
    assert earlier == pytest.approx([400, 400], rel=0.2)
    assert {draw.stage for draw in draws(curriculum(replay=0.0), 2)} == {2}


def test_draws_depend_on_seed_look_and_step_alone():
    assert draws(curriculum(), 1, 50) == draws(curriculum(), 1, 50)
    assert draws(curriculum(), 1, 50) != draws(curriculum(seed=1), 1, 50)


@pytest.mark.parametrize(
    ("stage", "loss", "steps", "over"),
    [
        (0, 0.79, 1, True), (0, 0.81, 10_000, False), (0, None, 10_000, False),
        (1, 0.6, 99, False), (1, 0.6, 100, True), (1, None, 100, True), (2, 0.0, 10_000, False),
    ],
)  # fmt: skip
def test_a_stage_is_over_once_its_loss_is_low_or_its_steps_are_done(stage, loss, steps, over):
    assert curriculum().is_over(stage, loss=loss, steps=steps) is over


@pytest.fixture
def rendered(curriculum_stores, tmp_path):
    """Put all pages there, for tests that do not look at their rendering."""
    shutil.copytree(curriculum_stores, tmp_path / "data")


@pytest.fixture
def small(tmp_path):
    experiment = validate(compose([*SMALL_CURRICULUM, "model=tiny", f"outputs={tmp_path}"]))
    module = build.build_datamodule(experiment, build.build_vocabulary(experiment))
    module.prepare_data()
    module.setup("fit")
    yield module
    module.teardown("fit")


def test_each_stage_has_its_canvas_and_batch_and_later_ones_wait_for_their_pages(small):
    order = small.train_dataloader().sampler
    seen = []
    for stage in range(3):
        small.reached.stage = stage
        seen.append([tuple(batch.images.shape) for batch in small.train_dataloader()])
    assert len(order) == 3
    assert set(seen[0]) == {(8, 1, 32, 224)}
    # replay: the stages before
    assert set(seen[1]) <= {(4, 1, 64, 224), (4, 1, 32, 224), (8, 1, 32, 224)}
    assert (2, 1, 96, 224) in seen[2]
    assert [batch.images.shape[2] for batch in small.val_dataloader()] == [96]


def test_corpora_that_differ_in_their_names_alone_hold_different_paragraphs():
    same = [f"curriculum.corpora.{name}.num_train=8" for name in ("old_pages", "late_pages")]
    typed = ["experiment=ten_minutes", *RECIPES["ten_minutes"], *same]
    experiment = validate(compose(typed))
    vocabulary = build.build_vocabulary(experiment)
    old, late = (
        build.build_datamodule(experiment, vocabulary).corpora[name].corpus
        for name in ("old_pages", "late_pages")
    )
    assert replace(old, seed=0) == replace(late, seed=0)
    assert old.seed != late.seed
    assert old.fingerprint() != late.fingerprint()


@pytest.mark.usefixtures("rendered")
def test_looks_differ_and_a_look_is_the_same_twice(small):
    order = small.train_dataloader().sampler
    first, again = [*order], [*order]
    order.set_epoch(1)
    second = [*order]
    assert first == again
    assert first != second
    lengths = small.lengths()
    for name, positions in [*first, *second]:
        assert len(set(np.array(positions) % lengths[name])) == len(positions), "without repetition"


def test_pages_are_prepared_beside_and_not_for_a_parent_that_is_gone(tmp_path):
    experiment = validate(compose([*SMALL_CURRICULUM, "model=tiny", f"outputs={tmp_path}"]))
    module = build.build_datamodule(experiment, build.build_vocabulary(experiment))
    corpora = [module.corpora[name].corpus for name in ("one_line", "two_lines")]
    root = tmp_path / "data"
    process = prepare_beside(corpora, root)
    assert process.wait(timeout=120) == 0
    assert all(store_path(corpus, root).exists() for corpus in corpora)


def test_a_training_that_ends_early_leaves_no_half_of_a_store_and_no_process(tmp_path):
    typed = [*SMALL_CURRICULUM, "curriculum.corpora.two_lines.num_train=20000"]
    experiment = validate(compose([*typed, "model=tiny", f"outputs={tmp_path}"]))
    module = build.build_datamodule(experiment, build.build_vocabulary(experiment))
    module.prepare_data()
    beside, path = module._beside, store_path(*module._store("two_lines"))
    until = time.monotonic() + 60
    while not any(path.parent.glob(f".{path.name}*")):
        assert beside.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = psutil.Process(beside.pid).children(recursive=True)
    module.teardown("fit")
    assert beside.poll() is not None
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
    assert not path.exists() and not any(path.parent.glob(f".{path.name}*"))


@pytest.mark.usefixtures("rendered")
def test_what_fails_beside_is_told_where_it_is_needed(small, monkeypatch, tmp_path):
    small.teardown("fit")
    path = store_path(small.corpora["two_lines"].corpus, small.pages.root)
    path.unlink(missing_ok=True)

    def refuse(*_, **__):
        raise UserError("no room")

    monkeypatch.setattr(type(small.corpora["two_lines"].corpus), "prepare", refuse)
    failed = subprocess.Popen(["false"])
    failed.wait()
    small._beside, small.reached.stage = failed, 1
    began = time.monotonic()
    with pytest.raises(UserError, match="no room"):
        small.lengths()
    assert time.monotonic() - began < 5
    small._beside = None


@pytest.mark.usefixtures("rendered")
def test_pages_in_memory_are_opened_ahead_of_their_stage_and_give_the_same_batches(
    monkeypatch, tmp_path
):
    def batches(placement):
        typed = [*SMALL_CURRICULUM, f"datamodule.placement={placement}", "model=tiny"]
        experiment = validate(compose([*typed, f"outputs={tmp_path}"]))
        module = build.build_datamodule(experiment, build.build_vocabulary(experiment))
        module.prepare_data()
        module.setup("fit")
        opened, seen = [], []
        monkeypatch.setattr(type(module), "_open", watched(opened))
        for stage in range(3):
            module.reached.stage = stage
            seen += module.train_dataloader()
        module.teardown("fit")
        return seen, opened

    def watched(opened):
        def open_it(module, name):
            opened.append((name, threading.current_thread() is threading.main_thread()))
            return plain_open(module, name)

        return open_it

    plain_open = CurriculumDataModule._open
    (plain, now), (kept, ahead) = batches("disk"), batches("host")
    names = "one_line", "two_lines", "pages"
    assert now == [(name, True) for name in names]
    assert ahead == [(name, False) for name in names]
    assert len(plain) == len(kept) == 9
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.tokens, other.tokens)


def test_a_stage_that_is_over_goes_on_until_the_next_one_s_pages_are_there(tmp_path):
    def module(*typed):
        experiment = validate(compose([*SMALL_CURRICULUM, *typed, f"outputs={tmp_path}"]))
        made = build.build_datamodule(experiment, build.build_vocabulary(experiment))
        made.prepare_data()
        made.setup("fit")
        return made

    many = "curriculum.corpora.two_lines.num_train=20000"
    slow = module("model=tiny", many, "curriculum.wait=false")
    try:
        assert not slow.may_begin(1), "it is being rendered"
        slow.curriculum = replace(slow.curriculum, wait=True)
        assert slow.may_begin(1), "and is waited for"
    finally:
        slow.teardown("fit")
    slow.curriculum = replace(slow.curriculum, wait=False)
    assert slow.may_begin(1), "nobody renders it: where it is opened, the reason shows"

    quick = module("model=tiny", "curriculum.wait=false", "datamodule.placement=host")
    quick.lengths()  # opens what comes ahead, in a thread
    until = time.monotonic() + 60
    while not quick.may_begin(1):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert store_path(*quick._store("two_lines")).exists()
    quick.teardown("fit")


@pytest.mark.usefixtures("rendered")
def test_training_stays_in_a_stage_until_the_next_may_begin(tmp_path):
    experiment = validate(compose([*SMALL_CURRICULUM, "model=tiny", f"outputs={tmp_path}"]))
    vocabulary = build.build_vocabulary(experiment)
    module = build.build_datamodule(experiment, vocabulary)
    learner = build.build_learner(
        experiment, build_model.build_recognizer(experiment, vocabulary), vocabulary
    )
    asked, stages = [], []

    def may_begin(stage):
        asked.append(stage)
        return len(asked) > 2

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer, learner):
            stages.append(module.reached.stage)

    follow = FollowCurriculum(module.curriculum, module.reached, may_begin)
    trainer = pl.Trainer(
        max_epochs=5, limit_val_batches=0, logger=False, enable_checkpointing=False,
        accelerator="cpu", callbacks=[follow, Note()], enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(learner, datamodule=module)
    assert asked[:3] == [1, 1, 1], "the first stage is over at each look"
    assert stages == [0, 0, 0, 1, 1]
