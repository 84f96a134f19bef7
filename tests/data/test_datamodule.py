"""What Lightning gets: every paragraph once an epoch, in an order that a resumed run takes up."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.datamodule import Order, ParagraphDataModule
from paragraph_ocr.errors import UserError
from paragraph_ocr.vocabulary import Vocabulary

BATCH = 5


@pytest.fixture(scope="module")
def root(noise, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    noise.prepare(root, num_workers=0)
    return root


@pytest.fixture
def make(noise, root, vocabulary):
    """Return a function that makes a data module ready for use."""

    def make(*, setup=True, **changes):
        settings = {"batch_size": BATCH, "num_workers": 0, "max_length": 64, "seed": 3} | changes
        module = ParagraphDataModule(noise, root=root, vocabulary=vocabulary, **settings)
        if setup:
            module.prepare_data()
            module.setup("fit")
        return module

    return make


def rows(loader) -> list[list[int]]:
    return [batch.rows.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_paragraph_comes_once_and_the_last_batch_is_kept(make, num_workers):
    module = make(num_workers=num_workers)
    batches = rows(module.train_dataloader())
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sorted(chain(*batches)) == list(range(23))
    assert [*chain(*rows(module.val_dataloader()))] == list(range(23, 29))
    assert [*chain(*rows(module.test_dataloader()))] == list(range(29, 35))


def test_the_order_depends_on_seed_and_epoch_alone(make):
    def order(seed, epoch, num_workers=0):
        loader = make(seed=seed, num_workers=num_workers).train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.rand(7)  # other random numbers do not matter
        return rows(loader)

    first = order(3, 0)
    assert first == order(3, 0) == order(3, 0, num_workers=2)
    assert first != order(3, 1)
    assert first != order(4, 0)
    assert order(3, 1) == order(3, 1)


def test_loading_takes_nothing_from_the_global_random_numbers(make):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rows(make(num_workers=2).train_dataloader())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("overfit", "num_batches"), [(1, 1), (2, 2), (99, 5), (1.0, 5), (0.5, 2), (0.01, 1)]
)
def test_overfitting_trains_and_scores_the_same_batches_in_order(make, overfit, num_batches):
    module = make(overfit_batches=overfit)
    train = rows(module.train_dataloader())
    assert len(train) == num_batches
    assert [*chain(*train)] == list(range(min(23, num_batches * BATCH)))
    assert train == rows(module.val_dataloader()) == rows(module.test_dataloader())
    assert "same" in repr(module)


def test_a_short_max_length_is_the_users_to_mend(make):
    longest = max(map(len, make()._datasets["train"].store.texts)) + 2
    make(max_length=longest)
    with pytest.raises(UserError, match=rf"^datamodule.max_length={longest - 1} .*={longest} or"):
        make(max_length=longest - 1)


def test_too_long_transcriptions_are_named_or_left_out_aloud(make, capsys):
    store = make()._datasets["train"].store
    lengths = sorted(len(text) + 2 for text in store.texts)
    limit = lengths[-4] - 1  # at least four are longer
    longer = [source for source, text in zip(store.sources, store.texts, strict=True)
              if len(text) + 2 > limit]  # fmt: skip
    with pytest.raises(UserError, match=rf"{len(longer)} of 35 .*too_long=skip") as refusal:
        make(max_length=limit)
    assert str(refusal.value).count(longer[0]) >= len(longer)
    capsys.readouterr()
    module = make(max_length=limit, too_long="skip")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(longer)} of 35 transcriptions" in said and "left out" in said
    kept = [len(store.texts[row]) + 2 for row in module._rows()]
    assert max(kept) <= limit and len(kept) == 35 - len(longer)
    with pytest.raises(UserError, match="leaves no paragraph of"):
        make(max_length=3, too_long="skip")


def test_a_vocabulary_that_lacks_a_character_is_the_users_to_mend(make, noise):
    with pytest.raises(UserError, match=r"^vocabulary.characters lacks 'Q'"):
        module = make(setup=False)
        module.vocabulary = Vocabulary(noise.characters.replace("Q", ""))
        module.setup()


def test_a_description_says_counts_size_and_lengths(make, noise):
    assert "not set up" in repr(make(setup=False))
    described = repr(make())
    for part in ("23 train", "6 val", "6 test", "32x48", "characters"):
        assert part in described


@pytest.mark.parametrize("length", [1, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_processes_share_the_positions_between_them(length, world_size, batch_size):
    def orders(seed, **steps):
        return [
            Order(
                length, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, **steps
            )
            for rank in range(world_size)
        ]

    for seed in (None, 0):
        once = [list(order) for order in orders(seed)]
        assert sorted(chain(*chain(*once))) == list(range(length))
        in_step = [list(order) for order in orders(seed, in_step=True)]
        assert len(set(map(len, in_step))) == 1
        positions = [*chain(*chain(*in_step))]
        assert set(positions) == set(range(length))
        assert len(positions) < length + world_size
        for order, batches in zip(orders(seed, in_step=True), in_step, strict=True):
            assert len(order) == len(batches)


def test_processes_take_each_step_what_one_process_would():
    whole = list(Order(22, batch_size=4, seed=3))
    shares = [
        list(Order(22, batch_size=2, seed=3, rank=rank, world_size=2, in_step=True))
        for rank in range(2)
    ]
    for step, together in enumerate(zip(*shares, strict=True)):
        assert sorted(chain(*together)) == sorted(whole[step])


LENGTHS = np.random.default_rng(0).integers(10, 400, size=103)


def bucketed(*, seed=0, epoch=0, rank=0, world_size=1, batch_size=4, buckets=6, start=(0, 0)):
    """Return one process's batches of positions, as label lengths and buckets order them."""
    order = Order(
        len(LENGTHS),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        in_step=True,
        start=start,
        label_lengths=LENGTHS,
        buckets=buckets,
    )
    order.set_epoch(epoch)
    batches = list(order)
    assert len(batches) == len(order) or start != (0, 0)
    return [[position - epoch * len(LENGTHS) for position in batch] for batch in batches]


def padding(batches) -> float:
    """Return the share of padding in the labels of batches of positions."""
    lengths = [LENGTHS[batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(len(each) * max(each) for each in lengths)


def test_like_lengths_come_together_in_a_random_order_of_their_own_each_epoch():
    plain, together = bucketed(buckets=0), bucketed()
    assert [*map(len, together)] == [*map(len, plain)] == [4] * 25 + [3]
    assert sorted(chain(*together)) == list(range(103))
    assert padding(together) < padding(plain) / 2
    assert padding(bucketed(buckets=26)) < padding(together)
    assert together == bucketed()
    for other in (bucketed(epoch=1), bucketed(seed=1), plain):
        assert {frozenset(batch) for batch in other} != {frozenset(batch) for batch in together}
    longest = [LENGTHS[batch].max() for batch in together]
    assert longest != sorted(longest)  # or training would go from short to long
    assert abs(np.corrcoef(np.arange(26), longest)[0, 1]) < 0.5


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_get_like_lengths_in_the_same_step_and_equally_many_batches(world_size):
    shares = [bucketed(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    positions = [*chain(*chain(*shares))]
    assert set(positions) == set(range(103))
    assert len(positions) < 103 + world_size
    whole = bucketed(batch_size=4 * world_size)
    for step, together in enumerate(zip(*shares, strict=True)):
        if step == len(whole) - 1:  # what is left, and what makes the batches equally many
            assert {*chain(*together)} >= {*whole[step]}
        else:
            assert {*chain(*together)} == {*whole[step]}
            longest = [int(LENGTHS[batch].max()) for batch in together]
            assert max(longest) - min(longest) < 0.2 * 400


def test_a_resumed_order_of_like_lengths_goes_on_where_it_stood():
    whole = bucketed(epoch=2)
    for done in (0, 1, 25):
        assert bucketed(epoch=2, start=(2, done)) == whole[done:]
    assert bucketed(epoch=3, start=(2, 7)) == bucketed(epoch=3)


def test_the_data_module_orders_its_labels_by_length(make):
    def spread(module):
        batches = [
            (batch.tokens != Vocabulary.pad).sum(dim=1) for batch in module.train_dataloader()
        ]
        return sum(int(lengths.max() - lengths.min()) for lengths in batches[:-1])

    assert spread(make(length_buckets=4)) < spread(make()) / 2
    assert rows(make(length_buckets=4).val_dataloader()) == rows(make().val_dataloader())
    overfit = make(length_buckets=4, overfit_batches=2)
    assert [*chain(*rows(overfit.train_dataloader()))] == list(range(10))


@pytest.mark.parametrize("placement", ["disk", "gpu"])
def test_labels_are_padded_to_a_multiple(make, placement):
    plain, padded = make(), make(pad_to_multiple=16, placement=placement)
    for name in ("train_dataloader", "val_dataloader"):
        for one, two in zip(getattr(plain, name)(), getattr(padded, name)(), strict=True):
            length = one.tokens.shape[1]
            assert two.tokens.shape[1] == -(-length // 16) * 16
            assert torch.equal(two.tokens[:, :length], one.tokens)
            assert (two.tokens[:, length:] == Vocabulary.pad).all()


class Recorder(pl.LightningModule):
    """Learns nothing; keeps the rows that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch, index):
        self.seen.append(batch.rows.tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def train(module, *, steps, resume=None, folder=None) -> list[list[int]]:
    recorder = Recorder()
    callbacks = []
    if folder is not None:
        callbacks = [
            pl.callbacks.ModelCheckpoint(
                dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"
            )
        ]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=resume, weights_only=True)
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loading",
    [{}, {"num_workers": 2}, {"placement": "host"}, {"placement": "gpu"}, {"length_buckets": 3}],
    ids=str,
)
def test_a_resumed_run_goes_on_with_the_very_batch_that_was_next(make, tmp_path, loading):
    whole = train(make(**loading), steps=14, folder=tmp_path)
    assert whole[:5] != whole[5:10]
    for step in (5, 7) if "num_workers" in loading else (2, 4, 5, 6, 9, 10, 12):
        checkpoint = tmp_path / f"step={step}.ckpt"
        resumed = train(make(**loading), steps=14, resume=checkpoint)
        assert resumed == whole[step:], step


def test_another_seed_of_the_data_is_another_store(noise, root, vocabulary):
    assert noise.prepare(root, num_workers=0) != replace(noise, seed=1).prepare(root, num_workers=0)


STRENGTHS = Strengths(
    rotation_deg=3.0,
    perspective=0.05,
    elastic_px=2.0,
    tremor_px=1.0,
    pen_px=1.0,
    paper=0.2,
    noise=0.1,
)


def pages(module, *, epoch=0) -> dict[int, bytes]:
    """Return the training pages of an epoch as they are loaded, by row."""
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {
        int(row): image.numpy().tobytes()
        for batch in loader
        for row, image in zip(batch.rows, batch.images, strict=True)
    }


def test_workers_augment_to_the_same_bytes_however_many_they_are(make):
    alone = pages(make(strengths=STRENGTHS))
    assert alone == pages(make(strengths=STRENGTHS, num_workers=1))
    assert alone == pages(make(strengths=STRENGTHS, num_workers=4))
    assert len(set(alone.values())) == 23


def test_an_epoch_and_a_seed_of_its_own_augment_otherwise(make):
    module = make(strengths=STRENGTHS, num_workers=1)  # workers live on from epoch to epoch
    first, second, again = pages(module), pages(module, epoch=1), pages(module, epoch=0)
    assert first == again
    assert all(first[row] != second[row] for row in first)
    other = pages(make(strengths=STRENGTHS, seed=4))
    assert all(first[row] != other[row] for row in first)


def test_what_is_scored_is_never_augmented(make):
    plain, augmented = make(), make(strengths=STRENGTHS)
    for name in ("val_dataloader", "test_dataloader"):
        for a, b in zip(getattr(plain, name)(), getattr(augmented, name)(), strict=True):
            assert torch.equal(a.images, b.images)
    assert pages(plain) != pages(augmented)


def test_what_happens_to_unknown_characters_is_said_with_counts(make, noise, capsys):
    module = make(setup=False)
    module.vocabulary = Vocabulary(noise.characters.replace("Q", ""), unknown="drop")
    module.setup()
    assert "vocabulary.unknown=drop changes 'Q' (U+0051) x" in capsys.readouterr().out
