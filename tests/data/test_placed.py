"""Pages kept in memory: the very batches that come from the disk."""

import numpy as np
import psutil
import pytest
import torch

from paragraph_ocr.batch import Batch
from paragraph_ocr.data import placed
from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.corpus import write_store
from paragraph_ocr.data.datamodule import ParagraphDataModule
from paragraph_ocr.data.dataset import ParagraphDataset, collate
from paragraph_ocr.data.paragraph import Paragraph
from paragraph_ocr.data.placed import PlacedDataset, free_bytes, require_room
from paragraph_ocr.data.store import Store, pack
from paragraph_ocr.errors import UserError

CANVASES = [(20, 30), (24, 16), (20, 30), (8, 40)]
CPU = torch.device("cpu")


class Mixed:
    """Noise on three canvases, some of it smaller than its canvas, in three splits."""

    name, counts = "mixed", {"train": 26, "val": 7, "test": 5}

    def fingerprint(self) -> str:
        return "m" * 32

    def prepare(self, root, *, num_workers, progress=None):
        generator = np.random.default_rng(0)
        made = []
        for split, count in self.counts.items():
            for number in range(count):
                canvas = CANVASES[number % len(CANVASES)]
                size = [side - int(generator.integers(3)) * (number % 3 == 0) for side in canvas]
                text = "".join(generator.choice([*"abc "], 1 + generator.integers(20)))
                page = generator.integers(1, 256, size=size, dtype=np.uint8)
                letters = None
                if number % 2:
                    letters = generator.integers(8, size=(2 + len(text.replace(" ", "")), 2))
                paragraph = Paragraph(page, f"x{text}x", split, "", "", letters)
                made.append(pack(paragraph, canvas=canvas))
        return write_store(self, root, made, total=len(made))


@pytest.fixture
def make(tmp_path, vocabulary):
    def make(placement, **changes) -> ParagraphDataModule:
        settings = {"batch_size": 5, "num_workers": 0, "max_length": 64, "seed": 3} | changes
        module = ParagraphDataModule(
            Mixed(), root=tmp_path, vocabulary=vocabulary, placement=placement, **settings
        )
        module.setup("fit")
        return module

    return make


def assert_same(batch: Batch, other: Batch) -> None:
    for name in ("images", "tokens", "sizes", "rows", "letters"):
        one, two = getattr(batch, name), getattr(other, name)
        if one is None:
            assert two is None
        else:
            torch.testing.assert_close(one, two, atol=0, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("placement", ["host", "gpu"])
@pytest.mark.parametrize("changes", [{}, {"overfit_batches": 2}], ids=["all", "overfit"])
def test_batches_from_memory_are_those_from_the_disk(make, placement, changes):
    disk, memory = make("disk", **changes), make(placement, **changes)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        expected, found = getattr(disk, name)(), getattr(memory, name)()
        for epoch in range(3):
            expected.sampler.set_epoch(epoch)
            found.sampler.set_epoch(epoch)
            assert len(expected) == len(found)
            for one, two in zip(expected, found, strict=True):
                assert_same(one, two)


def test_a_batch_of_one_canvas_is_as_large_as_that_and_a_mixed_one_as_the_largest(make):
    dataset = make("disk")._datasets["train"]
    assert isinstance(dataset, ParagraphDataset)
    for device in (None, CPU):
        memory = PlacedDataset(dataset, device=device)
        for positions in ([1], [3, 7], [0, 2, 4], [1, 3], [0, 1, 2, 3], [25, 27, 26 + 8]):
            expected = collate([dataset[position] for position in positions])
            assert_same(memory[positions], expected)


def test_pages_are_read_once(make, monkeypatch):
    module = make("host")
    read = []
    image = Store.image
    monkeypatch.setattr(Store, "image", lambda self, row: (read.append(row), image(self, row))[1])
    for _ in range(3):
        for loader in (module.train_dataloader(), module.val_dataloader()):
            assert len([*loader])
    assert sorted(read) == list(range(sum(Mixed.counts.values())))


def test_a_batch_may_be_changed_without_harm_to_the_pages(make):
    module = make("gpu")
    before = next(iter(module.val_dataloader()))
    next(iter(module.val_dataloader())).images.zero_()
    assert_same(next(iter(module.val_dataloader())), before)


def test_pages_that_do_not_fit_are_the_users_to_place_elsewhere(make, monkeypatch):
    module = make("host")
    pages = sum(np.prod(CANVASES[n % 4]) for count in (26, 7, 5) for n in range(count))
    monkeypatch.setattr(placed, "free_bytes", lambda: pages / 0.8 + 1)
    module.train_dataloader()
    monkeypatch.setattr(placed, "free_bytes", lambda: pages / 0.8 - 1)
    with pytest.raises(UserError, match=r"^datamodule.placement=host needs .* Pass .*=disk\.$"):
        make("host").train_dataloader()
    with pytest.raises(UserError, match="each of 2 processes"):
        require_room(module._datasets.values(), device=CPU, placement="host", processes=2)


def test_a_full_card_sends_pages_to_the_host(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    with pytest.raises(UserError, match=r"placement=gpu needs .* cuda:0 has .* Pass .*=host\.$"):
        require_room(
            make("disk")._datasets.values(), device=torch.device("cuda:0"), placement="gpu"
        )


def test_a_container_may_have_less_memory_than_its_host(tmp_path):
    assert 0 < free_bytes(tmp_path) <= psutil.virtual_memory().total
    limits = {
        "memory.max": "5000",
        "memory.current": "3000",
        "memory.stat": "anon 9\ninactive_file 700",
    }
    for name, text in limits.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_bytes(tmp_path) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) > 1_000_000


def test_pages_that_change_on_their_way_cannot_be_placed(make):
    with pytest.raises(ValueError, match="keeps pages as they are"):
        make("host", strengths=Strengths(rotation_deg=1.0))


def test_an_empty_split_has_no_batch(make, monkeypatch):
    monkeypatch.setattr(Mixed, "counts", {"train": 6, "val": 0, "test": 2})
    module = make("host")
    assert [*module.val_dataloader()] == []
    assert len([*module.train_dataloader()]) == 2


def test_what_is_placed_is_told_once(make, capsys):
    module = make("host")
    for _ in range(2):
        module.train_dataloader()
    assert capsys.readouterr().out.count("datamodule.placement=host: 0.00 GB of pages") == 1
