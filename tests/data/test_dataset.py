"""Items and batches: nothing lost, nothing longer than it must be."""

import numpy as np
import pytest
import torch

from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.augment_page import augment_page
from paragraph_ocr.data.dataset import ParagraphDataset, collate
from paragraph_ocr.data.store import Paragraph, Store, StoreWriter, pack
from paragraph_ocr.vocabulary import Vocabulary

TEXTS = ["a", "a line\nand another", "two words", "to be"]
SIZES = [(20, 30), (10, 40), (20, 30), (20, 30)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vocabulary) -> ParagraphDataset:
    path = tmp_path_factory.mktemp("store") / "a.h5"
    generator = np.random.default_rng(0)
    with StoreWriter(path, fingerprint="abc") as writer:
        for text, size in zip(TEXTS, SIZES, strict=True):
            image = generator.integers(1, 256, size=size, dtype=np.uint8)
            writer.add(pack(Paragraph(image, text, "train", "", "")))
    return ParagraphDataset(Store(path), range(4), vocabulary)


def test_a_batch_holds_every_image_and_text(dataset, vocabulary):
    batch = collate([dataset[index] for index in (3, 1, 0)])
    assert batch.rows.tolist() == [3, 1, 0]
    assert [vocabulary.decode(ids) for ids in batch.tokens[:, 1:].tolist()] == [
        TEXTS[row] for row in (3, 1, 0)
    ]
    assert batch.images.dtype == torch.uint8
    for place, row in enumerate(batch.rows.tolist()):
        height, width = SIZES[row]
        whole = batch.images[place, 0]
        assert (whole[:height, :width].numpy() == dataset.store.image(row)).all()
        assert whole.count_nonzero() == height * width  # the rest is paper


def test_labels_are_as_long_as_the_longest_of_the_batch(dataset):
    for indices in ([0], [0, 2], [0, 1, 2]):
        tokens = collate([dataset[index] for index in indices]).tokens
        assert tokens.shape[1] == 2 + max(len(TEXTS[index]) for index in indices)
        assert (tokens[:, 0] == Vocabulary.start).all()
        for index, row in zip(indices, tokens.tolist(), strict=True):
            end = 1 + len(TEXTS[index])
            assert row[end] == Vocabulary.end
            assert set(row[end + 1 :]) <= {Vocabulary.pad}


def test_sizes_are_given_only_where_an_image_does_not_fill_the_canvas(dataset):
    assert collate([dataset[0], dataset[2]]).sizes is None
    mixed = collate([dataset[0], dataset[1]])
    assert mixed.sizes.tolist() == [[20, 30], [10, 40]]
    assert mixed.images.shape == (2, 1, 20, 40)


def test_padding_within_the_stored_canvas_counts_as_padding(tmp_path, vocabulary):
    with StoreWriter(tmp_path / "a.h5", fingerprint="abc") as writer:
        image = np.ones((20, 30), np.uint8)
        writer.add(pack(Paragraph(image, "a", "train", "", ""), canvas=(32, 32)))
    dataset = ParagraphDataset(Store(tmp_path / "a.h5"), [0], vocabulary)
    batch = collate([dataset[0]])
    assert batch.images.shape == (1, 1, 32, 32)
    assert batch.sizes.tolist() == [[20, 30]]


def test_the_page_is_augmented_and_not_its_canvas(dataset, tmp_path, vocabulary):
    strengths = Strengths(rotation_deg=5.0, scale=0.2, noise=0.1)
    page = np.zeros((40, 60), np.uint8)
    page[8:-8, 8:-8] = 255
    with StoreWriter(tmp_path / "padded.h5", fingerprint="p") as writer:
        writer.add(pack(Paragraph(page, "x", "train", "", ""), canvas=(64, 96)))
    padded = ParagraphDataset(
        Store(tmp_path / "padded.h5"), [0], vocabulary, augmentation=(strengths, 5)
    )
    for epoch in (0, 1):
        image = padded[epoch].image
        alone = augment_page(page, strengths, np.random.default_rng([5, epoch, 0]))
        assert np.array_equal(image[:40, :60], alone)
        assert not image[40:].any()
        assert not image[:, 60:].any()
    assert np.array_equal(padded.store.image(0)[:40, :60], page)
