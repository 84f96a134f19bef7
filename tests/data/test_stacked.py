"""Stacked paragraphs: other ones in every epoch, the same ones for the same seed, wherever they are made."""

from itertools import chain

import numpy as np
import pytest
from test_datamodule import Recorder, train

from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.iam import LINE_CANVAS, IamCorpus
from paragraph_ocr.data.stacked import STACKED, StackedDataset, Stacking, stack
from paragraph_ocr.errors import UserError

CANVAS = (144, 160)
NUM = 12


@pytest.fixture(scope="module")
def corpus(iam_copies):
    return IamCorpus(
        name="iam", folder=iam_copies / "half", unit="paragraphs", height=CANVAS[0], width=CANVAS[1],
        lines_beside=LINE_CANVAS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    corpus.prepare(root, num_workers=0)
    return root


@pytest.fixture
def make(corpus, root, vocabulary):
    """Return a function that makes a data module ready for use."""

    def make(*, originals=False, max_lines=6, **changes):
        settings = {"batch_size": 5, "num_workers": 0, "max_length": 684, "seed": 3} | changes
        module = ParagraphDataModule(
            corpus,
            root=root,
            vocabulary=vocabulary,
            stacking=Stacking(CANVAS, NUM, max_lines, originals),
            **settings,
        )
        module.setup("fit")
        return module

    return make


def dataset(module) -> StackedDataset:
    return module._datasets["train"]


def same(one, other) -> bool:
    return one.tokens == other.tokens and (one.image == other.image).all()


def texts(vocabulary, loader) -> list[str]:
    return [vocabulary.decode(row) for batch in loader for row in batch.tokens[:, 1:].tolist()]


def test_only_the_training_set_is_stacked(make, iam_pages):
    module = make()
    assert len(dataset(module)) == NUM
    counts = {s: sum(page.split == s for page in iam_pages) for s in ("val", "test")}
    for split, count in counts.items():
        assert len(module._datasets[split]) == count
    for batch in chain(module.val_dataloader(), module.test_dataloader()):
        assert (batch.rows >= 0).all()
        assert batch.images.shape[2:] == CANVAS
    assert all((batch.rows == STACKED).all() for batch in module.train_dataloader())
    assert f"{NUM} of train stacked anew in every epoch" in repr(module)


def test_lines_are_training_lines_alone_each_once_in_their_order(make, iam_pages, vocabulary):
    training = {line.text for page in iam_pages if page.split == "train" for line in page.lines}
    found = dataset(make())
    counts = set()
    for index in range(60):
        lines = vocabulary.decode(found[index].tokens[1:]).split("\n")
        counts.add(len(lines))
        assert set(lines) <= training
        assert len(set(lines)) == len(lines)
    assert counts == set(range(1, 7))


def test_the_picture_holds_the_lines_from_top_to_bottom():
    lines = [np.full((10, 20 + n), 50 * (n + 1), np.uint8) for n in range(4)]
    for seed in range(20):
        sheet = stack(lines, np.random.default_rng(seed))
        first = [int(np.flatnonzero((sheet == 50 * (n + 1)).any(axis=1))[0]) for n in range(4)]
        last = [int(np.flatnonzero((sheet == 50 * (n + 1)).any(axis=1))[-1]) for n in range(4)]
        assert first == sorted(first) and last == sorted(last)
        assert sheet.shape[0] <= 40
        assert 23 <= sheet.shape[1] <= 23 + 20


def test_every_stacked_page_fits_its_canvas_whole(make):
    found = dataset(make(max_lines=15))
    for index in range(40):
        item = found[index]
        height, width = item.size
        assert item.image.shape == CANVAS
        assert not item.image[height:].any() and not item.image[:, width:].any()
        assert item.image[height - height // 2 : height].any()


def test_each_epoch_has_other_paragraphs_and_equal_seeds_equal_ones(make, vocabulary):
    def epoch(number, *, seed=3, num_workers=0):
        loader = make(seed=seed, num_workers=num_workers, batch_size=2).train_dataloader()
        loader.sampler.set_epoch(number)
        return texts(vocabulary, loader)

    first = epoch(0)
    assert first == epoch(0) == epoch(0, num_workers=2)
    assert len(set(first)) == NUM
    assert not set(first) & set(epoch(1))
    assert epoch(1) == epoch(1, num_workers=2)
    assert not set(first) & set(epoch(0, seed=4))


def test_a_paragraph_depends_on_seed_epoch_and_position_alone(make):
    one, other = dataset(make()), dataset(make())
    ahead = [other[index] for index in reversed(range(2 * NUM))][::-1]
    assert all(same(one[index], ahead[index]) for index in range(2 * NUM))


def test_originals_come_once_an_epoch_beside_the_stacked(make, iam_pages, vocabulary):
    module = make(originals=True)
    real = sorted(page.text for page in iam_pages if page.split == "train")
    assert len(dataset(module)) == NUM + len(real)
    for number in (0, 1):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        rows = [row for batch in loader for row in batch.rows.tolist()]
        assert sorted(row for row in rows if row != STACKED) == sorted(dataset(module).rows)
        assert rows.count(STACKED) == NUM
        assert rows != sorted(rows)
        loader.sampler.set_epoch(number)
        assert sorted(set(texts(vocabulary, loader)) & set(real)) == real


def test_a_label_never_exceeds_its_length(make):
    found = dataset(make(max_length=200, max_lines=15, too_long="skip"))
    lengths = [len(found[index].tokens) for index in range(60)]
    assert max(lengths) <= 200
    assert max(lengths) > 150


def test_lines_that_are_all_too_long_are_the_users_to_mend(make):
    with pytest.raises(UserError, match="leaves no training line|leaves no paragraph"):
        make(max_length=8, too_long="skip")


def test_overfitting_holds_the_first_paragraphs_of_the_first_epoch(make, vocabulary):
    module = make(overfit_batches=1)
    assert "the same 5 paragraphs" in repr(module)
    expected = [dataset(make())[index].tokens for index in range(5)]
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        for number in (0, 3):
            loader.sampler.set_epoch(number)
            assert texts(vocabulary, loader) == [vocabulary.decode(t[1:]) for t in expected]


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_within_an_epoch_sees_the_very_paragraphs_that_were_next(
    make, tmp_path, monkeypatch
):
    seen = []

    def step(self, batch, index):
        seen.append([tuple(row) for row in batch.tokens.tolist()])
        return self.layer(batch.images[:1, 0, :1, :1].float()[0]).sum()

    monkeypatch.setattr(Recorder, "training_step", step)
    train(make(), steps=8, folder=tmp_path)
    whole = list(seen)
    for done in (2, 3, 5):  # an epoch has three batches
        seen.clear()
        train(make(), steps=8, resume=tmp_path / f"step={done}.ckpt")
        assert seen == whole[done:]
